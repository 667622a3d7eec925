"""The tables of Kinetics, Something-Something, UCF101 and HMDB51, as downloaded:

    k400     *.csv with rows label,youtube_id,time_start,time_end,split; <id>_<start>_<end>.mp4, six
             digits each. Classes are numbered by name.
    ssv2     *labels.json, *train.json, *validation.json; <id>.webm
    ucf101   ucfTrainTestlist/{classInd,trainlist01,testlist01}.txt; <Class>/v_*.avi; --split 1 to 3
    hmdb51   testTrainMulti_7030_splits/<class>_test_split1.txt; <class>/*.avi; --split 1 to 3

Tables are in DIR or a folder in it, videos anywhere below.
"""
import csv
import json
import re

from sigma import UserError


def tables(root, pattern):
    """Tables of that name in root or a folder in it: (name, content), names in any coding."""
    found = sorted(root.glob(pattern)) + sorted(root.glob(f"*/{pattern}"))
    if not found:
        raise UserError(f"{root} has no table {pattern}: for the layout see python "
                        "extras/videos.py lists --help")
    return [(path.name, path.read_text("utf-8-sig", "surrogateescape")) for path in found]


def k400_rows(root, _):
    """Kinetics-400's rows; there is one split."""
    rows = [row for _, table in tables(root, "*.csv") for row in csv.DictReader(table.splitlines())
            if {"label", "youtube_id"} <= row.keys()]
    labels = {name: i for i, name in enumerate(sorted({row["label"] for row in rows}))}
    for row in rows:
        start, end = int(row["time_start"]), int(row["time_end"])
        split = row["split"].replace("validate", "val")
        yield split, f"{row['youtube_id']}_{start:06}_{end:06}", labels[row["label"]]


def ssv2_rows(root, _):
    """Something-Something V2's rows; there is one split."""
    labels = json.loads(tables(root, "*labels.json")[0][1])
    for split, pattern in (("train", "*train.json"), ("val", "*validation.json")):
        for row in json.loads(tables(root, pattern)[0][1]):
            yield split, row["id"], int(labels[re.sub(r"[][]", "", row["template"])])


def ucf101_rows(root, number):
    """UCF101's rows of split 1, 2 or 3."""
    words = tables(root, "classInd.txt")[0][1].split()
    labels = {name: int(i) - 1 for i, name in zip(words[::2], words[1::2])}
    for split, part in (("train", "train"), ("val", "test")):
        for word in tables(root, f"{part}list{number:02}.txt")[0][1].split():
            if "/" in word:  # else a label
                yield split, word.removesuffix(".avi"), labels[word.split("/")[0]]


def hmdb51_rows(root, number):
    """HMDB51's rows of split 1, 2 or 3."""
    for label, (file, table) in enumerate(tables(root, f"*_test_split{number}.txt")):
        words, folder = table.split(), file.split("_test_split")[0]
        for video, use in zip(words[::2], words[1::2]):
            split = {"1": "train", "2": "val"}.get(use)
            yield split, f"{folder}/{video.removesuffix('.avi')}", label


# Each yields (split, video, label) for the rows of a set's tables in root. video: the name of its
# file without suffix, for ucf101 and hmdb51 after its folder's.
ROWS = {"k400": k400_rows, "ssv2": ssv2_rows, "ucf101": ucf101_rows, "hmdb51": hmdb51_rows}
