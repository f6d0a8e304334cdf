"""Every builder on files in the exact original format, a handful of rows each; and on the real folders where they are.

`ZOO_DATA=<folder> pytest tests/trainers/test_data_builders.py` reads the real sets from there, a folder a set; without
it, from `shared/data` beside the checkout if that exists.
"""

import gzip
import io
import json
import os
import re
import tarfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image

import zoo
from trainers.cli import main
from trainers.data import DATASETS, load_dataset
from trainers.data.builders.images import Cifar10Sample
from trainers.data.builders.measurements import PARAMETERS
from trainers.data.builders.tables import F1Relational

BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data"
REAL = Path(os.environ["ZOO_DATA"]) if "ZOO_DATA" in os.environ else BESIDE


@dataclass(frozen=True)
class Case:
    """Files of a set, the size of each split, the first example of one of them, and a way to break a file."""

    files: dict[str, bytes]
    sizes: dict[str, int]
    first: dict[str, Any]  # of the first split
    broken: tuple[str, bytes, str]  # file, its bad content, the error
    optional: tuple[str, ...] = field(default=())  # files that may be missing


def encoded(**files: Any) -> dict[str, bytes]:
    return {name: content.encode() if isinstance(content, str) else content for name, content in files.items()}


def npy(value) -> bytes:
    raw = io.BytesIO()
    np.save(raw, value)
    return raw.getvalue()


def npz(**arrays) -> bytes:
    raw = io.BytesIO()
    np.savez(raw, **arrays)
    return raw.getvalue()


def picture(pixels: np.ndarray, kind: str, mode: str | None = None) -> bytes:
    raw = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(raw, kind, **({"quality": 100} if kind == "JPEG" else {}))
    return raw.getvalue()


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()


def lines(*rows) -> bytes:
    return "".join(f"{row}\n" for row in rows).encode()


def heads(points) -> bytes:
    raw, info = io.BytesIO(), np.empty((1, 1), object)
    info[0, 0] = {"location": np.asarray(points, float), "number": float(len(points))}
    scipy.io.savemat(raw, {"image_info": info})
    return raw.getvalue()


def csv_numbers(values) -> bytes:
    return lines(*(",".join(str(x) for x in row) for row in np.asarray(values).tolist()))


RNG = np.random.default_rng(0)
ETT_HEADER = "date,HUFL,HULL,MUFL,MULL,LUFL,LULL,OT"
AIR_HEADER = "Date;Time;CO(GT);PT08.S1(CO);NMHC(GT);C6H6(GT);PT08.S2(NMHC);NOx(GT);PT08.S3(NOx);NO2(GT);PT08.S4(NO2);PT08.S5(O3);T;RH;AH"  # fmt: skip # noqa: E501
AIR_ROW = "10/03/2004;18.00.00;2,6;1360;150;11,9;1046;166;1056;113;1692;1268;13,6;48,9;0,7578"
AIR_FILE = f"{AIR_HEADER};;,,,\r\n{AIR_ROW};;\r\n{AIR_ROW.replace('1360', '-200')};;,\r\n;;;;;,,,\r\n"
AIR_VALUES = [2.6, 1360, 150, 11.9, 1046, 166, 1056, 113, 1692, 1268, 13.6, 48.9, 0.7578]
M4 = np.arange(1, 49)
TS_HEADER = "#a comment\n@problemName X\n@timeStamps false\n@univariate true\n@classLabel true a b\n@data\n"
UEA_HEADER = "@problemName X\n@univariate false\n@dimensions 2\n@equalLength false\n@classLabel true 1 2\n@data\n"
SMAP_TABLE = 'chan_id,spacecraft,anomaly_sequences,class,num_values\nP-1,SMAP,"[[1, 2], [4, 4]]","[point, point]",6\n'
SMAP_TEST = RNG.normal(size=(6, 25))
SMD_TEST = RNG.random((5, 38)).astype(np.float32)
SMD_LABEL = np.array([0, 1, 1, 0, 0], np.uint8)
SMD_EXPLAINED = np.zeros((5, 38), bool)
SMD_EXPLAINED[1:3, [0, 37]] = True
STAY = "Time,Parameter,Value\n00:00,RecordID,132539\n00:07,HR,73\n27:37,Urine,60\n"
OUTCOMES = "RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death\n132539,6,1,5,-1,0\n"
STAY_EXAMPLE = dict(
    record=132539,
    minute=np.array([0, 7, 27 * 60 + 37], np.int32),
    parameter=np.array([PARAMETERS.index(p) for p in ("RecordID", "HR", "Urine")], np.int32),
    value=np.array([132539, 73, 60], np.float32),
    saps_i=6,
    sofa=1,
    length_of_stay=5,
    survival=-1,
    in_hospital_death=0,
)
ACCEL = np.array([[0, -0.3, 2.8, 9.7], [0.002, -0.7, 2.5, 9.7]], np.float32)
GYRO = np.array([[0, 0.7, 0.2, 0.1]], np.float32)
FALLS = "\ufefffilename,start_time,end_time\nF01/U01_R02,4.5,7.75\n"
FALL = dict(activity=b"F01", user=1, trial=2, accel=ACCEL, gyro=GYRO, fall=np.array([4.5, 7.75], np.float32))
FRAMES = RNG.normal(size=(3, 117)).astype(np.float32)
SERIES, GRAPH = RNG.normal(size=(4, 30)), RNG.integers(0, 2, (4, 4))
SYSTEM = dict(series=SERIES.T, graph=GRAPH.astype(float))
TRAJECTORY = RNG.random((42, 10)).round(6)
DREAM3_GRAPH = np.zeros((10, 10))
DREAM3_GRAPH[0, 1] = DREAM3_GRAPH[9, 2] = 1  # G2 -> G1, G3 -> G10: row = target
DREAM3_EDGES = "G2\tG1\t-\nG3\tG10\t+\n"
MUTAG = "2\n3 2\n0 2 1 2\n1 1 0\n0 1 0\n1 0\n5 0\n"
FOLDS = {f"MUTAG/10fold_idx/test_idx-{k}.txt": lines(0 if k == 3 else 1) for k in range(1, 11)}
QASM = 'OPENQASM 2.0;\ninclude "qelib1.inc";\nqreg q[3];\nx q[2];\ncx q[0], q[1];\n'
PIXELS = RNG.integers(0, 256, (28, 28), dtype=np.uint8)
DIGIT = RNG.integers(0, 17, 64)
COLORS = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
CIFAR = bytes([7]) + COLORS.transpose(2, 0, 1).tobytes()
CIFAR_NAMES = Cifar10Sample.names
FLAT = np.full((32, 32, 3), (40, 90, 200), np.uint8)  # JPEG keeps a single colour
EYE = np.full((6, 7, 3), (200, 100, 40), np.uint8)
VESSELS = RNG.integers(0, 2, (6, 7)).astype(bool)
EYES = {f"Image_{n:02}{side}": None for n in range(1, 15) for side in "LR"}
MELD_HEADER = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime"
MELD_ROW = '1,"Oh my God, he’s lost it.",Phoebe,sadness,negative,3,0,4,7,"00:20:57,256","00:21:00,049"'
FLAKY = 'id,project,test_name,full_code,label,category\n188,p,a.b,"@Test\npublic void x() {}",label,4\n'
ABC = 'X: 1\nT:A Waltz\nS:Someone\nM:3/4\nL:1/4\nK:G\ne|:"G"d2B|\n\n\nX: 2\nT:B\nM:6/8\nK:D\nabc|\n'
GENBANK = "LOCUS  {}  25 bp  DNA\nDEFINITION  x\nORIGIN  \n    1 acgtacgtac ggtttacgta\n   21 nnacg\n//\n"
PCD = "# .PCD v0.7\nVERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH 2\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS 2\nDATA ascii\n0.5 -1 0.25\n1 2 3\n"  # noqa: E501
MILLIMETRES = RNG.integers(0, 4000, (6, 7)).astype(np.uint16)
OV_LABELS = {  # in each part: patient 1 has both kinds, 2 one of them, 9 neither
    f"10/label_{part}_{kind}.csv": lines(*rows)
    for part in ("train", "val", "test")
    for kind, rows in (
        ("paired", (",Class", f"{part[:2]}1,1")),
        ("unpaired", ("sampleID,Class", f"{part[:2]}2,0", f"{part[:2]}9,0")),
    )
}
DATED = "start_date,end_date"
REPORT = f',{DATED},fact,preds\n1,2001-01-08,2001-01-12,"two\nlines",NA\n0,2001-01-01,2001-01-05,one,up\n'

CASES = {
    "ett_h1": Case(
        encoded(**{"ETTh1.csv": f"{ETT_HEADER}\n2016-07-01 00:00:00,1,2,3,4,5,6,0.123456789\n"}),
        {"series": 1},
        {"values": np.array([[1, 2, 3, 4, 5, 6, 0.123456789]]), "times": np.array([1467331200])},
        ("ETTh1.csv", f"{ETT_HEADER}\n2016-07-01 00:00:00,1,2,3,4,5,6,x\n".encode(), "line 2, column 'OT': 'x' is not"),
    ),
    "m4_hourly": Case(
        {
            "Hourly-train.csv": lines('"V1","V2","V3","V4"', '"H1","619","565",""', '"H2","1","2","3.5"'),
            "Hourly-test.csv": lines(
                ",".join(f'"V{i}"' for i in range(1, 50)), *(",".join([f'"H{k}"', *map(str, M4 * k)]) for k in (1, 2))
            ),
        },
        {"series": 2},
        {"id": b"H1", "history": np.array([619.0, 565.0]), "future": M4.astype(float)},
        ("Hourly-train.csv", lines('"V1","V2"', '"H1","a"', '"H2","1"'), "series H1: could not convert string"),
    ),
    "airquality": Case(
        {"AirQualityUCI.csv": AIR_FILE.encode()},
        {"series": 1},
        {
            "values": np.array([AIR_VALUES, [2.6, np.nan, *AIR_VALUES[2:]]]),
            "times": np.array([1078941600, 1078941600]),
        },
        ("AirQualityUCI.csv", f"{AIR_HEADER}\n{AIR_ROW.replace('1360', 'x')}\n".encode(), "line 2: could not convert"),
    ),
    "stock_prices": Case(
        {
            "price/raw/AAPL.csv": lines(
                "Date,Open,High,Low,Close,Adj Close,Volume", "1970-01-03,1.5,2,1,1.75,1.25,91973000"
            )
        },
        {"companies": 1},
        {
            "ticker": b"AAPL",
            "days": np.array([2]),
            "values": np.array([[1.5, 2, 1, 1.75, 1.25]], np.float32),
            "volume": np.array([91973000]),
        },
        (
            "price/raw/AAPL.csv",
            lines("Date,Open,High,Low,Close,Volume", "1970-01-03,1,2,1,1,9"),
            "no column 'Adj Close'",
        ),
    ),
    "stock_prices (packed)": Case(
        {
            "daily_prices.npz": npz(
                values=np.arange(20, dtype=np.float32).reshape(5, 2, 2),
                volume=np.array([[1, 2], [3, 4]]),
                dates=np.array(["1970-01-01", "1970-01-02"]),
                tickers=np.array(["A", "B"]),
                fields=np.array(["Open", "High", "Low", "Close", "Adj Close"]),
            )
        },
        {"companies": 2},
        {
            "ticker": b"A",
            "days": np.array([0, 1]),
            "values": np.array([[0, 4, 8, 12, 16], [1, 5, 9, 13, 17]], np.float32),
            "volume": np.array([1, 2]),
        },
        ("daily_prices.npz", npz(values=np.zeros(3)), "has no array volume, dates, tickers, fields; it has values"),
    ),
    "time_mmd/Energy": Case(
        encoded(
            **{
                "numerical/Energy/Energy.csv": f"date,OT,x,{DATED}\n1970-01-08,2.5,1,1970-01-08,1970-01-14\n"
                "1970-01-01,1.5,1,1970-01-01,1970-01-07\n",
                "textual/Energy/Energy_report.csv": REPORT,
                "textual/Energy/Energy_search.csv": REPORT,
            }
        ),
        {"series": 1},
        {
            "target": np.array([1.5, 2.5]),
            "series_start": np.array([0, 7]),
            "series_end": np.array([6, 13]),
            "report_fact": np.array([b"one", b"two\nlines"], object),
            "search_preds": np.array([b"up", b"NA"], object),
        },
        ("numerical/Energy/Energy.csv", f"OT,{DATED}\nx,2001-01-01,2001-01-01\n".encode(), "malformed: could not"),
    ),
    "smap_msl": Case(
        {
            "train/P-1.npy": npy(SMAP_TEST[:3]),
            "test/P-1.npy": npy(SMAP_TEST),
            "labeled_anomalies.csv": SMAP_TABLE.encode(),
        },
        {"channels": 1},
        {
            "channel": b"P-1",
            "spacecraft": b"SMAP",
            "train": SMAP_TEST[:3],
            "test": SMAP_TEST,
            "anomaly": np.array([0, 1, 1, 0, 1, 0], bool),
        },
        ("test/P-1.npy", npy(SMAP_TEST)[:-9], "is not a readable numpy file"),
    ),
    "smd": Case(
        {
            "ServerMachineDataset/train/machine-2-1.txt": csv_numbers(SMD_TEST[:2]),
            "ServerMachineDataset/test/machine-2-1.txt": csv_numbers(SMD_TEST),
            "ServerMachineDataset/test_label/machine-2-1.txt": lines(*SMD_LABEL),
            "ServerMachineDataset/interpretation_label/machine-2-1.txt": lines("1-3:1,38"),
        },
        {"machines": 1},
        {
            "machine": b"machine-2-1",
            "train": SMD_TEST[:2],
            "test": SMD_TEST,
            "anomaly": SMD_LABEL.astype(bool),
            "explained": SMD_EXPLAINED,
        },
        ("ServerMachineDataset/test_label/machine-2-1.txt", lines(0, 1), "has 2 labels for 5 test rows"),
    ),
    "smd (packed)": Case(
        {
            "machine-2-1.npz": npz(train=SMD_TEST[:2], test=SMD_TEST, test_label=SMD_LABEL),
            "machine-2-1_interpretation.txt": lines("1-3:1,38"),
        },
        {"machines": 1},
        {"test": SMD_TEST, "explained": SMD_EXPLAINED},
        ("machine-2-1_interpretation.txt", lines("1 to 3"), "'1 to 3' is not start-end:metric"),
    ),
    "physionet2012": Case(
        encoded(**{"set-a/132539.txt": STAY, "Outcomes-a.txt": OUTCOMES}),
        {"set_a": 1},
        STAY_EXAMPLE,
        ("set-a/132539.txt", STAY.replace("HR", "Heart").encode(), "132539.txt is malformed: 'Heart'"),
    ),
    "weda_fall": Case(
        encoded(
            **{
                "dataset/50Hz/F01/U01_R02_accel.csv": "accel_time_list,accel_x_list,accel_y_list,accel_z_list\n"
                "0.0,-0.3,2.8,9.7\n0.002,-0.7,2.5,9.7\n",
                "dataset/50Hz/F01/U01_R02_gyro.csv": "gyro_time_list,gyro_x_list,gyro_y_list,gyro_z_list\n"
                "0,0.7,0.2,0.1\n",
                "dataset/50Hz/F01/U01_R02_vertical_accel.csv": "vertical_Accel_x\n1\n",
                "dataset/fall_timestamps.csv": FALLS,
            }
        ),
        {"trials": 1},
        FALL,
        ("dataset/50Hz/F01/U01_R02_gyro.csv", lines("gyro_time_list,gyro_x_list", "0,1"), "no column 'gyro_y_list'"),
        optional=("dataset/50Hz/F01/U01_R02_vertical_accel.csv",),
    ),
    "weda_fall (packed)": Case(
        {
            "weda_fall_50hz.npz": npz(
                activity=np.array(["F01", "D02"]),
                user=np.array([1, 3], np.int16),
                trial=np.array([2, 1], np.int16),
                accel=np.concatenate([ACCEL, ACCEL]),
                gyro=np.concatenate([GYRO, GYRO]),
                accel_offset=np.array([0, 2, 4]),
                gyro_offset=np.array([0, 1, 2]),
            ),
            "fall_timestamps_subset.csv": FALLS.encode(),
        },
        {"trials": 2},
        FALL,
        (
            "fall_timestamps_subset.csv",
            lines("filename,start_time,end_time", "F01/U01_R02,x,1"),
            "F01/U01_R02: could not",
        ),
    ),
    "cmu_mocap/walking": Case(
        {f"{part}/walking/walking_1.txt": csv_numbers(FRAMES) for part in ("train", "test")},
        {"train": 1, "test": 1},
        {"name": b"walking_1", "frames": FRAMES},
        ("test/walking/walking_1.txt", csv_numbers(FRAMES[:, :100]), "has 100 columns instead of 117"),
    ),
    "cmu_mocap/walking (packed)": Case(
        {
            "walking.npz": npz(
                **{"train/walking_1": FRAMES, "train/walking_2": FRAMES[:2], "test/walking_1": FRAMES[:1]}
            )
        },
        {"train": 2, "test": 1},
        {"name": b"walking_1", "frames": FRAMES},
        ("walking.npz", npz(**{"train/walking_1": FRAMES}), "lacks train/walking_k or test/walking_k"),
    ),
    "eth_ucy": Case(
        {
            "biwi_eth.txt": lines("780\t1.0\t8.46\t3.59", "790\t1.0\t9.57\t3.79"),
            "crowds_zara01.txt": lines("0.0 1.0 1 2"),
        },
        {"recordings": 2},
        {
            "recording": b"biwi_eth",
            "frame": np.array([780, 790], np.int32),
            "agent": np.array([1, 1], np.int32),
            "position": np.array([[8.46, 3.59], [9.57, 3.79]], np.float32),
        },
        ("biwi_eth.txt", lines("780 1 8.46 3.59", "790 1 9.57"), "is malformed: the number of columns changed"),
        optional=("biwi_eth.txt", "crowds_zara01.txt"),
    ),
    "apava": Case(
        {
            "Feature/feature_01.npy": npy(np.arange(12.0).reshape(2, 3, 2)),
            "Feature/feature_02.npy": npy(np.zeros((1, 3, 2))),
            "Label/label.npy": npy(np.array([[1.0, 1.0], [0.0, 2.0]])),
        },
        {"subjects": 2},
        {"windows": np.arange(12, dtype=np.float32).reshape(2, 3, 2), "label": 1, "subject": 1},
        ("Label/label.npy", npy(np.array([[1.0, 1.0]])), "has the shape .1, 2. for 2 subjects"),
    ),
    "ucr/GunPoint": Case(
        encoded(
            **{
                "GunPoint_TRAIN.ts": f"{TS_HEADER}-1.5,2,0.25:b\n1,2,3:a\n",
                "GunPoint_TEST.ts": f"{TS_HEADER}1,?,3:a\n",
            }
        ),
        {"train": 2, "test": 1},
        {"series": np.array([[-1.5], [2], [0.25]], np.float32), "label": b"b"},
        ("GunPoint_TEST.ts", f"{TS_HEADER}1,2,3:c\n".encode(), "case 1: the class 'c' is not one of a, b"),
    ),
    "uea/JapaneseVowels": Case(
        encoded(
            **{
                "JapaneseVowels_TRAIN.ts": f"{UEA_HEADER}1,2,3:4,5,6:2\n1,2:3,4:1\n",
                "JapaneseVowels_TEST.ts": f"{UEA_HEADER}1:2:1\n",
            }
        ),
        {"train": 2, "test": 1},
        {"series": np.array([[1, 4], [2, 5], [3, 6]], np.float32), "label": b"2"},
        ("JapaneseVowels_TEST.ts", f"{UEA_HEADER}1,2:1\n".encode(), "case 1: 1 dimensions instead of 2"),
    ),
    "dream3/Size10Ecoli1": Case(
        {
            "InSilicoSize10-Ecoli1-trajectories.tsv": lines(
                '"Time"\t' + "\t".join(f'"G{i}"' for i in range(1, 11)),
                "",
                *(f"{10 * (i % 21)}\t" + "\t".join(map(str, row)) for i, row in enumerate(TRAJECTORY.tolist())),
            ),
            "InSilicoSize10-Ecoli1.tsv": DREAM3_EDGES.encode(),
        },
        {"systems": 1},
        {"name": b"Size10Ecoli1", "series": TRAJECTORY, "graph": DREAM3_GRAPH},
        ("InSilicoSize10-Ecoli1.tsv", lines("G2\tG11\t-"), "'G2\\\\tG11\\\\t-' is not an edge"),
    ),
    "dream3/Size10Ecoli1 (packed)": Case(
        {"Size10Ecoli1.npz": npz(TsData=TRAJECTORY), "InSilicoSize10-Ecoli1.tsv": DREAM3_EDGES.encode()},
        {"systems": 1},
        {"series": TRAJECTORY, "graph": DREAM3_GRAPH},
        ("Size10Ecoli1.npz", npz(TsData=TRAJECTORY[:, :9]), r"of shape \(10, 10\) does not fit series of \(42, 9\)"),
    ),
    "lorenz96": Case(
        {f"F_10_T_30_dataset_{i}.npz": npz(X_np=SERIES, Gref=GRAPH, n=4, T=30) for i in (10, 2)},
        {"systems": 2},
        {"name": b"F_10_T_30_dataset_2", **SYSTEM},
        ("F_10_T_30_dataset_2.npz", npz(X_np=SERIES), "has no array Gref; it has X_np"),
        optional=("F_10_T_30_dataset_10.npz", "F_10_T_30_dataset_2.npz"),
    ),
    "var": Case(
        {"S_30_T_30_dataset_0.npz": npz(X_np=SERIES, Gref=GRAPH)},
        {"systems": 1},
        {"name": b"S_30_T_30_dataset_0", **SYSTEM},
        ("S_30_T_30_dataset_0.npz", b"no", "is not a readable numpy file"),
    ),
    "netsim": Case(
        {"sim3_subject_0.npz": npz(X_np=SERIES, Gref=GRAPH.astype(np.int16))},
        {"systems": 1},
        {"name": b"sim3_subject_0", **SYSTEM},
        ("sim3_subject_0.npz", npz(X_np=SERIES[:3], Gref=GRAPH), "does not fit"),
    ),
    "causal_air_quality": Case(
        {"data.npy": npy(np.array([[1, np.nan], [2, 3]], np.float32)), "graph.npy": npy(np.eye(2))},
        {"systems": 1},
        {"name": b"air_quality", "series": np.array([[1, np.nan], [2, 3]]), "graph": np.eye(2)},
        ("graph.npy", npy(np.eye(3)), "does not fit"),
    ),
    "tu_graphs/MUTAG": Case(
        {"MUTAG/MUTAG.txt": MUTAG.encode(), **FOLDS},
        {"graphs": 2},
        {
            "label": 2,
            "tags": np.array([0, 1, 0], np.int32),
            "senders": np.array([0, 0, 1, 2], np.int32),
            "receivers": np.array([1, 2, 0, 0], np.int32),
            "test_fold": 2,
        },
        ("MUTAG/MUTAG.txt", MUTAG.replace("0 2 1 2", "0 3 1 2").encode(), "graph 0 does not have the nodes or neigh"),
    ),
    "beta_kg": Case(
        {
            "triples_1c": lines("0\t0\t1\t0\t0", "2\t1\t3\t1971\t1977"),
            "triples_2c": lines("5 2 6 -44 -44"),
            "sup_pairs": lines("0\t5"),
            "ref_pairs": lines("2\t6", "3\t7"),
            "rel_ids_1": lines("0\tborn in", "1\tplays for"),
            "rel_ids_2": lines("2\tdeathPlace"),
        },
        {"graphs": 1},
        {
            "triples_1": np.array([[0, 0, 1, 0, 0], [2, 1, 3, 1971, 1977]], np.int32),
            "triples_2": np.array([[5, 2, 6, -44, -44]], np.int32),
            "seed_pairs": np.array([[0, 5]], np.int32),
            "test_pairs": np.array([[2, 6], [3, 7]], np.int32),
            "relations_1": np.array([b"born in", b"plays for"], object),
            "relations_2": np.array([b"deathPlace"], object),
        },
        ("sup_pairs", lines("0 a"), "sup_pairs is malformed: could not convert string 'a'"),
    ),
    "queko": Case(
        {"BNTF/3QBT_02CYC_X_0.qasm": QASM.encode(), "meta/3QBT_02CYC_X_0_solution.csv": lines(2, 0, 1)},
        {"circuits": 1},
        {
            "name": b"3QBT_02CYC_X_0",
            "qubits": 3,
            "depth": 2,
            "gates": np.array([[2, -1], [0, 1]], np.int32),
            "placement": np.array([2, 0, 1], np.int32),
        },
        ("BNTF/3QBT_02CYC_X_0.qasm", QASM.replace("cx", "cz").encode(), "is neither an x nor a cx gate"),
    ),
    "movielens100k/users": Case(
        {
            "u.data": lines("1\t20\t3\t881250949", "2\t5\t1\t5", "1\t10\t5\t881250940"),
            "u.user": lines("1|24|M|technician|85711", "2|53|F|other|94043"),
        },
        {"users": 2},
        {
            "user": 1,
            "age": 24,
            "gender": b"M",
            "occupation": b"technician",
            "films": np.array([10, 20]),
            "ratings": np.array([5, 3]),
            "times": np.array([881250940, 881250949]),
        },
        ("u.user", lines("1|24|M"), "is not id|age|gender|occupation|zip"),
    ),
    "movielens100k/films": Case(
        {"u.item": f"1|Café (1995)|01-Jan-1995||http://x|{'|'.join('0001' + '0' * 15)}\n".encode("latin-1")},
        {"films": 1},
        {"film": 1, "title": "Café (1995)".encode(), "date": b"01-Jan-1995", "genres": np.arange(19) == 3},
        ("u.item", lines("1|Toy|01-Jan-1995||http://x|0|1"), "film 1 does not have 19 genres"),
    ),
    "sequential_rec/Beauty": Case(
        {"Beauty.txt": lines("1 1 2 3", "2 6")},
        {"users": 2},
        {"user": 1, "items": np.array([1, 2, 3], np.int32)},
        ("Beauty.txt", lines("1 1 2", "2 x"), "line 2: invalid literal"),
    ),
    "sequential_rec/Beauty_attributes": Case(
        {"Beauty_item2attributes.json": b'{"4": [1, 2], "83": [4]}'},
        {"items": 2},
        {"item": 4, "attributes": np.array([1, 2], np.int32)},
        ("Beauty_item2attributes.json", b'{"4": [1', "is not a json object of item"),
    ),
    "f1_relational/driver_position": Case(
        {
            f"driver_position_{part}.csv": lines("date,driverId,position", "1970-01-03,2,14.75")
            for part in ("train", "val", "test")
        },
        {"train": 1, "valid": 1, "test": 1},
        {"day": 2, "driver": 2, "position": 14.75},
        ("driver_position_val.csv", lines("date,driverId,position", "1970-01-03,2,x"), "row 1: could not convert"),
    ),
    "f1_relational/tables": Case(
        {f"f1db_csv/{name}.csv": lines("raceId,name", '1,"A, B"', "2,\\N") for name in F1Relational.tables},
        {"tables": 9},
        {
            "name": b"circuits",
            "columns": np.array([b"raceId", b"name"], object),
            "cells": np.array([b"1", b"A, B", b"2", b"\\N"], object),
        },
        ("f1db_csv/races.csv", lines("raceId,name", "1"), "row 1: 1 cells instead of 2"),
    ),
    "imdb_sample": Case(
        {
            "aclImdb/train/neg/0_3.txt": b"Bad.<br />Very.",
            "aclImdb/train/pos/0_9.txt": b"Good.",
            "aclImdb/test/neg/1_1.txt": b"No.",
            "aclImdb/test/pos/7_10.txt": b"Yes.",
        },
        {"train": 2, "test": 2},
        {"text": b"Bad.<br />Very.", "label": 0, "rating": 3},
        ("aclImdb/train/pos/0_9.txt", b"\xff\xfe", "is not text in utf-8"),
    ),
    "imdb_sample (sample)": Case(
        {
            "imdb_sample.jsonl": lines(
                *(
                    json.dumps({"split": s, "label": 1, "id": 3, "rating": 8, "text": f"{s}!"})
                    for s in ("train", "test")
                )
            )
        },
        {"train": 1, "test": 1},
        {"text": b"train!", "label": 1, "rating": 8},
        ("imdb_sample.jsonl", lines('{"split": "train", "label": 1}'), "line 1: KeyError"),
    ),
    "sentence_classification/sst2": Case(
        {
            f"data/stsa.binary.{part}": "1 a stirring , crème brûlée\n0 no .\n".encode("latin-1")
            for part in ("train", "dev", "test")
        },
        {"train": 2, "valid": 2, "test": 2},
        {"text": "a stirring , crème brûlée".encode(), "label": 1},
        ("data/stsa.binary.dev", lines("2 what ?"), "line 1: not a label below 2 and a sentence"),
    ),
    "sentence_classification/trec": Case(
        {f"data/TREC.{part}.all": lines("5 How far is it ?") for part in ("train", "test")},
        {"train": 1, "test": 1},
        {"text": b"How far is it ?", "label": 5},
        ("data/TREC.test.all", lines("5"), "line 1: not a label below 6"),
    ),
    "sentence_classification/cola": Case(
        {
            "cola_public/raw/in_domain_train.tsv": lines(
                "gj04\t1\t\tOur friends won't buy it.", "gj04\t0\t*\tThe was."
            ),
            "cola_public/raw/out_of_domain_dev.tsv": lines("clc95\t1\t\tSomebody just left."),
        },
        {"train": 2, "valid": 1},
        {"text": b"Our friends won't buy it.", "label": 1},
        ("cola_public/raw/out_of_domain_dev.tsv", lines("clc95\tx\t\tNo."), "line 1: no sentence with the label"),
    ),
    "sentence_classification/cola (two columns)": Case(
        {"cola/train.tsv": lines("somebody just left\t1", "the was\t0"), "cola/dev.tsv": lines("who\t1")},
        {"train": 2, "valid": 1},
        {"text": b"somebody just left", "label": 1},
        ("cola/dev.tsv", lines("who"), "line 1: no sentence with the label"),
    ),
    "tiny_shakespeare": Case(
        {"input.txt": b"First Citizen:\nSpeak"},
        {"train": 1, "valid": 1},
        {"text": b"First Citizen:\nSpe"},
        ("input.txt", b"\xff\xff\xff", "is not text in utf-8"),
    ),
    "multi30k_de_en": Case(
        {
            f"{part}.{language}": f"{language} eins\u2028zwei\n{language} grün\n".encode()
            for part in ("train", "val", "test_2016_flickr")
            for language in ("de", "en")
        },
        {"train": 2, "valid": 2, "test": 2},
        {"de": "de eins\u2028zwei".encode(), "en": "en eins\u2028zwei".encode()},
        ("val.de", lines("one"), "val.de has 1 lines, the English file 2"),
    ),
    "meld_text": Case(
        {f"{part}_sent_emo.csv": lines(MELD_HEADER, MELD_ROW) for part in ("train", "dev", "test")},
        {"train": 1, "valid": 1, "test": 1},
        {
            "text": "Oh my God, he’s lost it.".encode(),
            "speaker": b"Phoebe",
            "emotion": 4,
            "sentiment": 2,
            "dialogue": 3,
            "utterance": 0,
        },
        (
            "dev_sent_emo.csv",
            lines(MELD_HEADER, MELD_ROW.replace("sadness", "sad")),
            "row 1: 'sad', 'negative' are unkn",
        ),
    ),
    "flakylens": Case(
        encoded(**{f"{part}_set_1.csv": FLAKY for part in ("train", "valid", "test")}),
        {"train": 1, "valid": 1, "test": 1},
        {"text": b"@Test\npublic void x() {}", "project": b"p", "name": b"a.b", "label": 4},
        ("valid_set_1.csv", FLAKY.replace(",4", ",6").encode(), "row 1: the category '6' is not 0 to 5"),
    ),
    "nottingham": Case(
        {"ABC_cleaned/ashover.abc": ABC.encode()},
        {"tunes": 2},
        {
            "file": b"ashover",
            "number": 1,
            "metre": b"3/4",
            "key": b"G",
            "abc": b'X: 1\nT:A Waltz\nS:Someone\nM:3/4\nL:1/4\nK:G\ne|:"G"d2B|',
        },
        ("ABC_cleaned/ashover.abc", ABC.replace("K:D", "").encode(), "a tune lacks X:, M: or K:"),
    ),
    "dna_gene_family": Case(
        {"chimp_data.txt": lines("sequence\tclass", "ATGCN\t4", "TTT\t0")},
        {"genes": 2},
        {"sequence": b"ATGCN", "label": 4},
        ("chimp_data.txt", lines("sequence\tclass", "ATGX\t4"), "row 1: not a sequence of ACGTN"),
    ),
    "dna_fly_or_cress": Case(
        {f"{name}.gb": GENBANK.format(name).encode() for name in ("extra_keywords", "arab1", "NC_000932")},
        {"records": 3},
        {"name": b"extra_keywords", "organism": b"fly", "sequence": b"ACGTACGTACGGTTTACGTANNACG"},
        (
            "arab1.gb",
            GENBANK.format("arab1").replace("nnacg", "").encode(),
            "20 bases between ORIGIN and //, 25 stated",
        ),
    ),
    "moleculenet/clintox": Case(
        {
            "clintox.csv": lines("smiles,FDA_APPROVED,CT_TOX", "CC,1,0", "CO,,1", "C,0,0"),
            "clintox_scaffold_split.npz": npz(train=np.array([1]), valid=np.array([], np.int32), test=np.array([0])),
        },
        {"molecules": 3},
        {"smiles": b"CC", "targets": np.array([1, 0], np.float32), "part": b"test"},
        ("clintox.csv", lines("smiles,CT_TOX", "CC,1"), "has no column 'FDA_APPROVED'; its columns are smiles, CT_TOX"),
        optional=("clintox_scaffold_split.npz",),
    ),
    "smiles_logp": Case(
        {"logP_labels.csv": lines(",SMILES,Kow", "1,CC,1.5", "4,CO,-0.25")},
        {"molecules": 2},
        {"smiles": b"CC", "logp": 1.5},
        ("logP_labels.csv", lines(",SMILES,Kow", "1,CC,?"), "row 1: could not convert"),
    ),
    "ov_omics/10": Case(
        {
            "OV/10/mRNA.csv": lines("sample,A,B", "tr1,0.5,0.25", "va1,1,0", "te1,0,0"),
            "OV/miRNA.csv": lines("sample,M", *(f"{part}{k},0.75" for part in ("tr", "va", "te") for k in (1, 2))),
            **{f"OV/{name}": content for name, content in OV_LABELS.items()},
        },
        {"train": 2, "valid": 2, "test": 2},
        {
            "patient": b"tr1",
            "mrna": np.array([0.5, 0.25], np.float32),
            "mirna": np.array([0.75], np.float32),
            "label": 1,
        },
        ("OV/10/label_val_paired.csv", lines(",Class", "va1,2"), "va1: the class '2' is not 0 or 1"),
    ),
    "pcn_demo_clouds": Case(
        {"car.pcd": PCD.encode()},
        {"clouds": 1},
        {"name": b"car", "points": np.array([[0.5, -1, 0.25], [1, 2, 3]], np.float32)},
        ("car.pcd", PCD.replace("1 2 3\n", "").encode(), r"holds points \(1, 3\) instead of 2: cut off"),
    ),
    "mnist": Case(
        {
            "train-images-idx3-ubyte": idx(np.stack([PIXELS, PIXELS.T])),
            "train-labels-idx1-ubyte": idx(np.array([5, 9])),
            "t10k-images-idx3-ubyte": idx(PIXELS[None]),
            "t10k-labels-idx1-ubyte": idx(np.array([0])),
        },
        {"train": 2, "test": 1},
        {"image": PIXELS[..., None], "label": 5},
        ("t10k-images-idx3-ubyte", idx(PIXELS[None])[:-1], "is not an idx file of 3 axes, or is cut off"),
    ),
    "digits8x8": Case(
        {"optdigits.tes": csv_numbers([[*DIGIT, 3], [*DIGIT[::-1], 0]])},
        {"digits": 2},
        {"image": DIGIT.astype(np.uint8).reshape(8, 8, 1), "label": 3},
        ("optdigits.tes", csv_numbers([[*DIGIT, 10]]), "pixels must be 0 to 16 and labels 0 to 9"),
    ),
    "sign_mnist_fragment": Case(
        {
            "sign_mnist_train.csv": lines(
                ",".join(["label", *(f"pixel{i}" for i in range(1, 785))]), ",".join(map(str, [24, *PIXELS.ravel()]))
            ),
            "sign_mnist_test.csv": lines(",".join(map(str, [6, *PIXELS.ravel()]))),  # some copies have no header
        },
        {"train": 1, "test": 1},
        {"image": PIXELS[..., None], "label": 24},
        ("sign_mnist_test.csv", lines("6,107,118"), "line 1: not a label and 784 grey values"),
    ),
    "cifar10_sample": Case(
        {"cifar-10-batches-bin/data_batch_1.bin": CIFAR * 2, "cifar-10-batches-bin/test_batch.bin": CIFAR},
        {"train": 2, "test": 1},
        {"image": COLORS, "label": 7},
        ("cifar-10-batches-bin/test_batch.bin", CIFAR[:-1], "does not consist of labels 0 to 9 and 3,072 pixel"),
    ),
    "chase_db1": Case(
        {
            **{f"{stem}.jpg": picture(EYE, "JPEG") for stem in EYES},
            **{f"{stem}_{n}HO.png": picture(VESSELS, "PNG", "1") for stem in EYES for n in ("1st", "2nd")},
        },
        {"train": 20, "test": 8},
        {"name": b"Image_01L", "vessels": VESSELS, "second_observer": VESSELS},
        ("Image_14R_2ndHO.png", b"no picture", "is not a readable picture"),
    ),
    "shanghaitech/part_B": Case(
        {
            f"part_B_final/{part}_data/{file}": content
            for part in ("train", "test")
            for file, content in (
                ("images/IMG_1.jpg", picture(EYE, "JPEG")),
                ("ground-truth/GT_IMG_1.mat", heads([[3.5, 2.25], [1, 6]])),
            )
        },
        {"train": 1, "test": 1},
        {"name": b"IMG_1", "points": np.array([[3.5, 2.25], [1, 6]], np.float32)},
        ("part_B_final/test_data/ground-truth/GT_IMG_1.mat", b"no matrix", "holds no points of heads"),
    ),
    "set11": Case(
        {"Monarch.tif": picture(PIXELS, "TIFF"), "house.tif": picture(PIXELS, "TIFF", "P")},
        {"test": 2},
        {"name": b"Monarch", "image": PIXELS},
        ("house.tif", picture(PIXELS, "TIFF")[:4], "is not a readable picture"),
        optional=("Monarch.tif", "house.tif"),
    ),
    "depth_sr/RGBDD": Case(
        {
            "RGBDD/Depth/2020_HR_gt.png": picture(MILLIMETRES, "PNG"),
            "RGBDD/RGB/2020_RGB.jpg": picture(EYE, "JPEG"),
        },
        {"pairs": 1},
        {"name": b"2020", "depth": MILLIMETRES},
        ("RGBDD/Depth/2020_HR_gt.png", picture(MILLIMETRES[:3], "PNG"), r"is \(3, 7\), its colour image \(6, 7, 3\)"),
    ),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTENTION_ZOO_CACHE", str(tmp_path / "cache"))


def write(folder: Path, files: dict[str, bytes], *, zipped: bool = False) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / (f"{name}.gz" if zipped else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content, 1) if zipped else content)
    return str(folder)


def set_of(case: str) -> str:
    return case.split(" (")[0]


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", CASES)
def test_reads_the_original_format(name, zipped, tmp_path):
    case = CASES[name]
    found = load_dataset(set_of(name), write(tmp_path / "files", case.files, zipped=zipped))
    assert {split: len(source) for split, source in found.items()} == case.sizes
    example = found[next(iter(case.sizes))][0]
    for key, expected in case.first.items():
        same(example[key], expected)


@pytest.mark.parametrize("name", CASES)
def test_a_malformed_file_is_named(name, tmp_path):
    file, content, message = CASES[name].broken
    folder = write(tmp_path / "files", CASES[name].files | {file: content})
    with pytest.raises(zoo.UserError, match=message) as caught:
        load_dataset(set_of(name), folder)
    assert file.rsplit("/", 1)[-1].split("_")[0].split(".")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_a_missing_file_is_named(name, tmp_path):
    case = CASES[name]
    with pytest.raises(zoo.UserError, match=r"holds none of .* \(the files of .*\); it holds nothing"):
        load_dataset(set_of(name), write(tmp_path / "empty", {}))
    for number, file in enumerate(file for file in case.files if file not in case.optional):
        if number in (0, len(case.files) - 1):
            rest = {other: content for other, content in case.files.items() if other != file}
            with pytest.raises(
                zoo.UserError, match=r"holds? (no|none of) |is one of 27 photographs|no colour image|for 1 subjects"
            ):
                load_dataset(set_of(name), write(tmp_path / f"without {number}", rest))


def test_archives_are_looked_into(tmp_path):
    case = CASES["physionet2012"]
    with tarfile.open(tmp_path / "set-a.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("set-a/132539.txt")
        member.size = len(STAY)
        archive.addfile(member, io.BytesIO(STAY.encode()))
    (tmp_path / "Outcomes-a.txt").write_text(OUTCOMES)
    found = load_dataset("physionet2012", str(tmp_path))["set_a"][0]
    for key, expected in case.first.items():
        same(found[key], expected)
    with zipfile.ZipFile(tmp_path / "GunPoint.zip", "w") as archive:
        for name, content in CASES["ucr/GunPoint"].files.items():
            archive.writestr(name, content)
    assert len(load_dataset("ucr/GunPoint", str(tmp_path))["train"]) == 2
    (tmp_path / "GunPoint.zip").write_bytes((tmp_path / "GunPoint.zip").read_bytes()[:-30])
    with pytest.raises(zoo.UserError, match=r"GunPoint\.zip is damaged"):
        load_dataset("ucr/GunPoint", str(tmp_path))


def test_jpeg_sample_of_cifar(tmp_path):
    with tarfile.open(tmp_path / "cifar10_jpeg_sample.tar.gz", "w:gz") as archive:
        for part in ("train", "test"):
            for name in CIFAR_NAMES:
                raw = picture(FLAT, "JPEG")
                member = tarfile.TarInfo(f"{part}/{name}/0000.jpg")
                member.size = len(raw)
                archive.addfile(member, io.BytesIO(raw))
    found = load_dataset("cifar10_sample", str(tmp_path))["train"]
    assert [example["label"] for example in found] == list(range(10))
    assert np.abs(found[3]["image"].astype(int) - FLAT).max() <= 3


def test_the_same_file_twice_is_not_guessed(tmp_path):
    folder = write(tmp_path, {f"{place}/GunPoint_TRAIN.ts": b"x" for place in "ab"})
    with pytest.raises(zoo.UserError, match=r"holds GunPoint_TRAIN\.ts more than once: .*a/GunPoint.*b/GunPoint"):
        load_dataset("ucr/GunPoint", folder)


def test_an_edited_file_is_read_again(tmp_path):
    folder = write(tmp_path, CASES["ucr/GunPoint"].files)
    before = load_dataset("ucr/GunPoint", folder)["train"][0]
    write(tmp_path, {"GunPoint_TRAIN.ts": f"{TS_HEADER}9,2,0.25:a\n".encode()})
    after = load_dataset("ucr/GunPoint", folder)["train"][0]
    assert (before["label"], after["label"]) == (b"b", b"a")


def test_a_moved_folder_is_the_same_data(tmp_path):
    folders = [write(tmp_path / place / "set", CASES["ucr/GunPoint"].files) for place in "ab"]
    for folder in folders:
        load_dataset("ucr/GunPoint", folder)
    assert len(list((tmp_path / "cache" / "tfds").iterdir())) == 1


def test_other_members_of_an_archive_are_tried(tmp_path):
    files = {name.replace("GunPoint", "ECG200"): content for name, content in CASES["ucr/GunPoint"].files.items()}
    assert len(load_dataset("ucr/ECG200", write(tmp_path, files))["test"]) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smdd", "no data set is called 'smdd'; did you mean 'smd'"),
        ("ucr", "ucr is a collection: name a member of it, e.g. ucr/GunPoint"),
        ("tu_graphs/MUTAGS", "tu_graphs has no member 'MUTAGS'; did you mean 'MUTAG'"),
        ("smd/x", "smd has no member 'x'"),
        ("dream3/Size10Ecoli1", "is not downloaded: fetch it from https://www.synapse.org.* with --data-dir"),
    ],
)
def test_names_that_cannot_be_loaded(name, message):
    with pytest.raises(zoo.UserError, match=message):
        load_dataset(name)


def test_without_a_network_nothing_else_is_taken(monkeypatch, tmp_path):
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "tfds"))

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(zoo.UserError, match=r"cannot be downloaded from https://.*ml-100k\.zip .*no route.*--data-dir"):
        load_dataset("movielens100k/films")


@pytest.mark.parametrize("name", ["smap_msl", "mnist", "tu_graphs/MUTAG"])
def test_downloads_are_found_under_their_original_names(name, monkeypatch, tmp_path):
    """The download itself is replaced; the URLs of the catalogue must lead to the names that the builder asks for."""
    import tensorflow_datasets as tfds

    files = dict(CASES[name].files)
    if name == "smap_msl":
        raw = io.BytesIO()
        with zipfile.ZipFile(raw, "w") as archive:
            for member in ("train/P-1.npy", "test/P-1.npy"):
                archive.writestr(f"data/{member}", files.pop(member))
        files["data.zip"] = raw.getvalue()

    def download(_, url):
        base = url.rsplit("/", 1)[-1]
        (content,) = (c for n, c in files.items() if n.rsplit("/", 1)[-1] == base.removesuffix(".gz"))
        path = tmp_path / f"{abs(hash(url))}"  # TFDS names files by their hash
        path.write_bytes(gzip.compress(content) if base.endswith(".gz") else content)
        return path

    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO())
    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    found = load_dataset(name)
    assert {split: len(source) for split, source in found.items()} == CASES[name].sizes


def test_every_set_says_what_a_user_must_know():
    covered = {set_of(name).split("/")[0] for name in CASES}
    for name, facts in DATASETS.items():
        assert facts.task, name
        assert facts.description, name
        assert facts.licence, name
        assert facts.size, name
        if name != "standin":
            assert facts.home.startswith("http"), name
            assert facts.citation, name
            assert facts.builder, name
            assert facts.urls or re.search("kaggle|synapse", facts.home), name
            assert name in covered or facts.columns, name


def test_the_list_shows_every_set_with_task_size_and_licence(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")  # a line each
    main(["list", "--data"])
    rows = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in capsys.readouterr().out.splitlines()]
    listed = {row[0]: row for row in rows if len(row) == 5}
    for name, facts in DATASETS.items():
        assert listed[name][1:] == [facts.task, facts.size, facts.description, facts.licence]
        assert all(f"/{member}" in listed for member in facts.members)


# What the READMEs of the real folders state: split sizes, and a sum that depends on every example.
SIZES: dict[str, dict[str, int]] = {
    "ett_h1": {"series": 1},
    "exchange_rate": {"series": 1},
    "illness": {"series": 1},
    "m4_hourly": {"series": 414},
    "airquality": {"series": 1},
    "stock_prices": {"companies": 24},
    "time_mmd/Energy": {"series": 1},
    "time_mmd/Health_US": {"series": 1},
    "smap_msl": {"channels": 20},
    "smd": {"machines": 2},
    "physionet2012": {"set_a": 800},
    "weda_fall": {"trials": 344},
    "cmu_mocap/walking": {"train": 5, "test": 1},
    "cmu_mocap/running": {"train": 5, "test": 1},
    "cmu_mocap/soccer": {"train": 5, "test": 1},
    "eth_ucy": {"recordings": 5},
    "ucr/GunPoint": {"train": 50, "test": 150},
    "ucr/ItalyPowerDemand": {"train": 67, "test": 1029},
    "ucr/ArrowHead": {"train": 36, "test": 175},
    "ucr/Coffee": {"train": 28, "test": 28},
    "uea/BasicMotions": {"train": 40, "test": 40},
    "uea/JapaneseVowels": {"train": 270, "test": 370},
    "dream3/Size100Ecoli1": {"systems": 1},
    "dream3/Size100Yeast1": {"systems": 1},
    "dream3/Size10Ecoli1": {"systems": 1},
    "dream3/Size10Yeast1": {"systems": 1},
    "lorenz96": {"systems": 8},
    "var": {"systems": 5},
    "netsim": {"systems": 10},
    "causal_air_quality": {"systems": 1},
    "tu_graphs/MUTAG": {"graphs": 188},
    "tu_graphs/PTC": {"graphs": 344},
    "tu_graphs/IMDBBINARY": {"graphs": 1000},
    "beta_kg": {"graphs": 1},
    "queko": {"circuits": 60},
    "movielens100k/users": {"users": 943},
    "movielens100k/films": {"films": 1682},
    "sequential_rec/Beauty": {"users": 22_363},
    "sequential_rec/Beauty_attributes": {"items": 12_101},
    "f1_relational/driver_position": {"train": 7453, "valid": 499, "test": 760},
    "f1_relational/tables": {"tables": 9},
    "imdb_sample": {"train": 5000, "test": 5000},
    "sentence_classification/sst2": {"train": 6920, "valid": 872, "test": 1821},
    "sentence_classification/trec": {"train": 5452, "test": 500},
    "sentence_classification/cola": {"train": 8551, "valid": 516},
    "tiny_shakespeare": {"train": 1, "valid": 1},
    "multi30k_de_en": {"train": 29_000, "valid": 1014, "test": 1000},
    "meld_text": {"train": 9989, "valid": 1109, "test": 2610},
    "flakylens": {"train": 5076, "valid": 1269, "test": 2229},
    "nottingham": {"tunes": 519},
    "dna_gene_family": {"genes": 1682},
    "dna_fly_or_cress": {"records": 3},
    "moleculenet/BBBP": {"molecules": 2050},
    "moleculenet/FreeSolv_SAMPL": {"molecules": 642},
    "moleculenet/Lipophilicity": {"molecules": 4200},
    "moleculenet/clintox": {"molecules": 1484},
    "smiles_logp": {"molecules": 14_176},
    "ov_omics/10": {"train": 211, "valid": 31, "test": 63},
    "pcn_demo_clouds": {"clouds": 4},
    "mnist": {"train": 10_000, "test": 10_000},
    "digits8x8": {"digits": 1797},
    "cifar10_sample": {"train": 4000, "test": 1000},
    "sign_mnist_fragment": {"train": 188, "test": 11},
    "chase_db1": {"train": 20, "test": 8},
    "set11": {"test": 11},
    "depth_sr/Middlebury": {"pairs": 4},
    "depth_sr/Lu": {"pairs": 1},
    "depth_sr/RGBDD": {"pairs": 8},
}


def labels(split, key: str = "label") -> list[int]:
    values, counts = np.unique([example[key] for example in split], return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


# Set -> a number its README states (rounded as there), computed from the examples.
FIGURES = {
    "ett_h1": (lambda d: d["series"][0]["values"].shape, (17_420, 7)),
    "exchange_rate": (lambda d: d["series"][0]["values"].shape, (7_588, 8)),
    "illness": (lambda d: d["series"][0]["values"].shape, (966, 7)),
    "m4_hourly": (lambda d: {len(e["history"]) for e in d["series"]}, {700, 960}),
    "airquality": (
        lambda d: np.isnan(d["series"][0]["values"]).mean(0).round(2)[[0, 2, 5, 7]].tolist(),
        [0.18, 0.9, 0.18, 0.18],
    ),
    "stock_prices": (lambda d: {e["values"].shape for e in d["companies"]}, {(1258, 5)}),
    "time_mmd/Energy": (
        lambda d: [len(d["series"][0][k]) for k in ("target", "report_fact", "search_fact")],
        [1622, 354, 2314],
    ),
    "time_mmd/Health_US": (
        lambda d: [len(d["series"][0][k]) for k in ("target", "report_fact", "search_fact")],
        [1389, 864, 2087],
    ),
    "smap_msl": (lambda d: [sum(len(e[k]) for e in d["channels"]) for k in ("train", "test")], [50_071, 118_825]),
    "smd": (lambda d: [round(e["anomaly"].mean() * 100, 1) for e in d["machines"]], [4.9, 4.1]),
    "physionet2012": (lambda d: sum(e["in_hospital_death"] for e in d["set_a"]), 112),
    "weda_fall": (lambda d: sum(e["activity"].startswith(b"F") for e in d["trials"]), 125),
    "cmu_mocap/walking": (lambda d: [sum(len(e["frames"]) for e in d[s]) for s in ("train", "test")], [2085, 359]),
    "cmu_mocap/running": (lambda d: [sum(len(e["frames"]) for e in d[s]) for s in ("train", "test")], [838, 163]),
    "cmu_mocap/soccer": (lambda d: [sum(len(e["frames"]) for e in d[s]) for s in ("train", "test")], [2766, 598]),
    "eth_ucy": (
        lambda d: {e["recording"]: (len(e["frame"]), len(set(e["agent"]))) for e in d["recordings"]},
        {
            b"biwi_eth": (5492, 360),
            b"biwi_hotel": (6543, 389),
            b"crowds_zara01": (5153, 148),
            b"crowds_zara03": (5005, 137),
            b"uni_examples": (2747, 118),
        },
    ),
    "uea/BasicMotions": (lambda d: [*labels(d["train"])], [b"Badminton", b"Running", b"Standing", b"Walking"]),
    "uea/JapaneseVowels": (
        lambda d: [(min(n), max(n)) for n in ([len(e["series"]) for e in d[s]] for s in ("train", "test"))],
        [(7, 26), (7, 29)],
    ),
    "dream3/Size100Ecoli1": (lambda d: d["systems"][0]["graph"].sum(), 125),
    "dream3/Size100Yeast1": (lambda d: d["systems"][0]["graph"].sum(), 166),
    "dream3/Size10Ecoli1": (lambda d: d["systems"][0]["graph"].sum(), 11),
    "dream3/Size10Yeast1": (lambda d: d["systems"][0]["graph"].sum(), 10),
    "causal_air_quality": (lambda d: int(np.isnan(d["systems"][0]["series"]).sum()), 41_771),
    "tu_graphs/MUTAG": (
        lambda d: (labels(d["graphs"]), round(sum(len(e["senders"]) for e in d["graphs"]) / 2 / 188, 2)),
        ({0: 63, 2: 125}, 19.79),
    ),
    "tu_graphs/PTC": (
        lambda d: (labels(d["graphs"]), round(sum(len(e["senders"]) for e in d["graphs"]) / 2 / 344, 2)),
        ({0: 192, 1: 152}, 25.96),
    ),
    "tu_graphs/IMDBBINARY": (
        lambda d: (labels(d["graphs"]), labels(d["graphs"], "test_fold")),
        ({0: 500, 1: 500}, {k: 100 for k in range(10)}),
    ),
    "beta_kg": (
        lambda d: [len(d["graphs"][0][k]) for k in ("triples_1", "triples_2", "seed_pairs", "test_pairs")],
        [199_879, 162_320, 12_109, 28_255],
    ),
    "movielens100k/users": (lambda d: sum(len(e["ratings"]) for e in d["users"]), 100_000),
    "sequential_rec/Beauty": (lambda d: sum(len(e["items"]) for e in d["users"]), 198_502),
    "sequential_rec/Beauty_attributes": (lambda d: len({a for e in d["items"] for a in e["attributes"].tolist()}), 637),
    "f1_relational/tables": (
        lambda d: {e["name"].decode(): len(e["cells"]) // len(e["columns"]) for e in d["tables"]}["results"],
        25_860,
    ),
    "imdb_sample": (lambda d: [labels(d[s]) for s in d], [{0: 2500, 1: 2500}] * 2),
    "tiny_shakespeare": (lambda d: len({*(d["train"][0]["text"] + d["valid"][0]["text"])}), 65),
    "meld_text": (lambda d: len({e["dialogue"] for e in d["train"]}), 1038),
    "flakylens": (
        lambda d: [list(labels(d[s]).values()) for s in d],
        [[52, 25, 20, 25, 50, 4904], [13, 6, 5, 7, 12, 1226], [11, 6, 8, 9, 31, 2164]],
    ),
    "nottingham": (
        lambda d: labels(d["tunes"], "file"),
        {b"ashover": 46, b"jigs": 340, b"reelsa-c": 81, b"waltzes": 52},
    ),
    "dna_gene_family": (lambda d: list(labels(d["genes"]).values()), [234, 185, 144, 228, 261, 109, 521]),
    "dna_fly_or_cress": (lambda d: [len(e["sequence"]) for e in d["records"]], [154_329, 86_436, 154_478]),
    "moleculenet/BBBP": (lambda d: sum(e["part"] != b"" for e in d["molecules"]), 2039),
    "moleculenet/clintox": (lambda d: sum(e["part"] != b"" for e in d["molecules"]), 1480),
    "pcn_demo_clouds": (lambda d: [len(e["points"]) for e in d["clouds"]], [753, 1511, 1193, 1715]),
    "digits8x8": (lambda d: (min(labels(d["digits"]).values()), max(labels(d["digits"]).values())), (174, 183)),
    "cifar10_sample": (lambda d: [labels(d[s]) for s in d], [{k: 400 for k in range(10)}, {k: 100 for k in range(10)}]),
    "chase_db1": (lambda d: round(float(np.mean([e["vessels"].mean() for s in d for e in d[s]])) * 100, 1), 6.9),
    "set11": (lambda d: sorted(e["image"].shape for e in d["test"])[-3:], [(256, 256), (512, 512), (512, 512)]),
}
FOLDERS = {name: REAL / name.split("/")[0] for name in SIZES if (REAL / name.split("/")[0]).is_dir()}


def test_the_folder_that_was_asked_for_holds_sets():
    assert "ZOO_DATA" not in os.environ or FOLDERS, f"ZOO_DATA={os.environ.get('ZOO_DATA')} holds none of the sets"


# Without real folders, the one case checks that the table names sets that exist.
@pytest.mark.parametrize("name", FOLDERS or ["none"])
def test_the_real_folder_is_as_its_readme_states(name):
    if name == "none":
        assert {key.split("/")[0] for key in SIZES | FIGURES} <= set(DATASETS)
        return
    found = load_dataset(name, str(FOLDERS[name]))
    assert {split: len(source) for split, source in found.items()} == SIZES[name]
    if name in FIGURES:
        figure, expected = FIGURES[name]
        assert figure(found) == expected
