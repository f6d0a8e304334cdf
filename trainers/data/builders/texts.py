"""Texts: sentences and reviews with labels, translations, one long text, tunes in ABC, DNA."""

import json
import re
from collections.abc import Iterable

import numpy as np
import tensorflow_datasets as tfds

from trainers.data.builders.base import Example, Reader, scalar, text
from trainers.data.files import Files
from zoo.errors import UserError

__all__ = []


def _labels(*names: str) -> tfds.features.ClassLabel:
    return tfds.features.ClassLabel(names=names)


class ImdbSample(Reader, skip_registration=True):
    def features(self):
        return {"text": text(), "label": _labels("negative", "positive"), "rating": scalar(np.int32)}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        read = self._sample if files.has("imdb_sample.jsonl") else self._original
        return {part: read(files, part) for part in ("train", "test")}

    @staticmethod
    def _sample(files: Files, part: str) -> Iterable[Example]:
        for i, line in enumerate(files.lines("imdb_sample.jsonl"), 1):
            try:
                row = json.loads(line)
                if row["split"] == part:
                    yield {key: row[key] for key in ("text", "label", "rating")}
            except (ValueError, KeyError) as error:
                raise UserError(f"{files.path('imdb_sample.jsonl')}, line {i}: {error!r}") from error

    @staticmethod
    def _original(files: Files, part: str) -> Iterable[Example]:
        for label in ("neg", "pos"):
            for name in files.all(f"{part}/{label}/*_*.txt"):
                rating = int(re.search(r"_(\d+)\.txt$", name)[1])
                yield {"text": files.text(name), "label": int(label == "pos"), "rating": rating}


class SentenceClassification(Reader, skip_registration=True):
    questions = ("description", "entity", "abbreviation", "human", "number", "location")

    def features(self):
        names = {"sst2": ("negative", "positive"), "trec": self.questions, "cola": ("unacceptable", "acceptable")}
        return {"text": text(), "label": _labels(*names[self.config])}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        if self.config == "sst2":
            parts = {"train": "train", "valid": "dev", "test": "test"}
            return {split: self._label_first(files, f"stsa.binary.{part}", 2) for split, part in parts.items()}
        if self.config == "trec":
            return {split: self._label_first(files, f"TREC.{split}.all", 6) for split in ("train", "test")}
        original = files.has("raw/in_domain_train.tsv")
        parts = (
            ("raw/in_domain_train.tsv", "raw/out_of_domain_dev.tsv") if original else ("cola/train.tsv", "cola/dev.tsv")
        )
        return {split: self._cola(files, name, original) for split, name in zip(("train", "valid"), parts, strict=True)}

    @staticmethod
    def _label_first(files: Files, name: str, classes: int) -> Iterable[Example]:
        for i, line in enumerate(files.lines(name, "latin-1"), 1):
            label, _, sentence = line.partition(" ")
            if label not in map(str, range(classes)) or not sentence:
                raise UserError(f"{files.path(name)}, line {i}: not a label below {classes} and a sentence")
            yield {"text": sentence, "label": int(label)}

    @staticmethod
    def _cola(files: Files, name: str, original: bool) -> Iterable[Example]:
        for i, line in enumerate(files.lines(name), 1):
            cells = line.split("\t")  # original: source, label, the author's mark, sentence
            label, sentence = (cells[1], cells[-1]) if original else (cells[-1], cells[0])
            if len(cells) != (4 if original else 2) or label not in ("0", "1"):
                raise UserError(f"{files.path(name)}, line {i}: no sentence with the label 0 or 1")
            yield {"text": sentence, "label": int(label)}


class TinyShakespeare(Reader, skip_registration=True):
    def features(self):
        return {"text": text()}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        whole = files.text("input.txt")
        cut = int(0.9 * len(whole))
        return {"train": [{"text": whole[:cut]}], "valid": [{"text": whole[cut:]}]}


class Multi30kDeEn(Reader, skip_registration=True):
    def features(self):
        return {"de": text(), "en": text()}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        parts = {"train": "train", "valid": "val", "test": "test_2016_flickr"}
        return {split: self._pairs(files, part) for split, part in parts.items()}

    @staticmethod
    def _pairs(files: Files, part: str) -> Iterable[Example]:
        de, en = (files.text(f"{part}.{language}").strip("\n").split("\n") for language in ("de", "en"))
        if len(de) != len(en):
            raise UserError(f"{files.path(f'{part}.de')} has {len(de)} lines, the English file {len(en)}")
        return ({"de": x, "en": y} for x, y in zip(de, en, strict=True))


class MeldText(Reader, skip_registration=True):
    emotions = ("neutral", "joy", "surprise", "anger", "sadness", "disgust", "fear")
    sentiments = ("neutral", "positive", "negative")

    def features(self):
        return {
            "text": text(),
            "speaker": text(),
            "emotion": _labels(*self.emotions),
            "sentiment": _labels(*self.sentiments),
            "dialogue": scalar(np.int32),
            "utterance": scalar(np.int32),
        }

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        parts = {"train": "train", "valid": "dev", "test": "test"}
        return {split: self._rows(files, f"{part}_sent_emo.csv") for split, part in parts.items()}

    def _rows(self, files: Files, name: str) -> Iterable[Example]:
        columns = ("Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID")
        for i, row in enumerate(files.table(name, columns), 1):
            if row["Emotion"] not in self.emotions or row["Sentiment"] not in self.sentiments:
                raise UserError(f"{files.path(name)}, row {i}: {row['Emotion']!r}, {row['Sentiment']!r} are unknown")
            yield {
                "text": row["Utterance"],
                "speaker": row["Speaker"],
                "emotion": row["Emotion"],
                "sentiment": row["Sentiment"],
                "dialogue": int(row["Dialogue_ID"]),
                "utterance": int(row["Utterance_ID"]),
            }


class Flakylens(Reader, skip_registration=True):
    causes = ("async wait", "concurrency", "time", "unordered collections", "test order dependency", "not flaky")

    def features(self):
        return {"text": text(), "project": text(), "name": text(), "label": _labels(*self.causes)}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        return {part: self._rows(files, f"{part}_set_1.csv") for part in ("train", "valid", "test")}

    @staticmethod
    def _rows(files: Files, name: str) -> Iterable[Example]:
        for i, row in enumerate(files.table(name, ("project", "test_name", "full_code", "category")), 1):
            if row["category"] not in ("0", "1", "2", "3", "4", "5"):
                raise UserError(f"{files.path(name)}, row {i}: the category {row['category']!r} is not 0 to 5")
            yield {
                "text": row["full_code"],
                "project": row["project"],
                "name": row["test_name"],
                "label": int(row["category"]),
            }


class Nottingham(Reader, skip_registration=True):
    """A tune an example: its ABC text from X: on, with metre and key of its header."""

    def features(self):
        return {"file": text(), "number": scalar(np.int32), "metre": text(), "key": text(), "abc": text()}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        return {"tunes": self._tunes(files)}

    @staticmethod
    def _tunes(files: Files) -> Iterable[Example]:
        for name in files.all("ABC_cleaned/*.abc"):
            for tune in re.split(r"(?m)^(?=X:)", files.text(name).replace("\r", ""))[1:]:
                header = {key: re.search(rf"(?m)^{key}:\s*(\S.*?)\s*$", tune) for key in "XMK"}
                if not all(header.values()) or not header["X"][1].isdigit():
                    raise UserError(f"{files.path(name)}: a tune lacks X:, M: or K: ({tune[:30]!r})")
                yield {
                    "file": name.rsplit("/", 1)[-1].removesuffix(".abc"),
                    "number": int(header["X"][1]),
                    "metre": header["M"][1],
                    "key": header["K"][1],
                    "abc": tune.strip(),
                }


class DnaGeneFamily(Reader, skip_registration=True):
    families = (
        "G-protein coupled receptor", "tyrosine kinase", "tyrosine phosphatase", "synthetase", "synthase",
        "ion channel", "transcription factor",
    )  # fmt: skip

    def features(self):
        return {"sequence": text(), "label": _labels(*self.families)}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        return {"genes": self._genes(files)}

    @staticmethod
    def _genes(files: Files) -> Iterable[Example]:
        for i, row in enumerate(files.table("chimp_data.txt", ("sequence", "class"), delimiter="\t"), 1):
            if not re.fullmatch("[ACGTN]+", row["sequence"]) or row["class"] not in map(str, range(7)):
                raise UserError(f"{files.path('chimp_data.txt')}, row {i}: not a sequence of ACGTN with a class 0 to 6")
            yield {"sequence": row["sequence"], "label": int(row["class"])}


class DnaFlyOrCress(Reader, skip_registration=True):
    records = {"extra_keywords": "fly", "arab1": "cress", "NC_000932": "cress chloroplast"}  # noqa: RUF012

    def features(self):
        return {"name": text(), "organism": text(), "sequence": text()}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        return {"records": self._records(files)}

    def _records(self, files: Files) -> Iterable[Example]:
        for name, organism in self.records.items():
            record = files.text(f"{name}.gb", "latin-1")
            match = re.search(r"^ORIGIN[^\n]*\n([\sa-z0-9]+)\n//", record, re.MULTILINE)
            stated = re.search(r"^LOCUS\s+\S+\s+(\d+) bp", record)
            sequence = re.sub(r"[\s0-9]", "", match[1]).upper() if match else ""
            if stated is None or int(stated[1]) != len(sequence):
                raise UserError(
                    f"{files.path(f'{name}.gb')} is not a whole GenBank record: {len(sequence)} bases between ORIGIN "
                    f"and //, {stated[1] if stated else 'no number'} stated"
                )
            yield {"name": name, "organism": organism, "sequence": sequence}
