"""Exported pictures lie where the public scripts look for them, each read back by a reader of its own; a stop loses nothing."""

from __future__ import annotations

import json
import re
import tracemalloc
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from accel.errors import AccelError, OptionError
from accel.evals.drawing.export_folder import ExportFolder
from accel.evals.drawing.exports import LAYOUTS, Drawn, Picture, Plan, Subject, layout_named, read_subjects
from accel.evals.drawing.npz import write_npz

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

CLASSES = tuple(Subject(label=label) for label in (3, 5, 8))
GENEVAL = [
    '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}',
    '{"tag":"colors",  "include": [], "prompt": "a photo of a blue caf\\u00e9"}',
]


class Painter:
    """Paints a picture of one colour, told by its seed, and notes what it was asked for."""

    def __init__(self, size: tuple[int, int] = (6, 4)) -> None:
        self.size = size
        self.asked: list[list[int]] = []

    def draw(self, pictures: Sequence[Picture]) -> list[Any]:
        self.asked.append([picture.number for picture in pictures])
        return [Image.new("RGB", self.size, colour(picture.seed)) for picture in pictures]


def colour(seed: int) -> tuple[int, int, int]:
    return seed % 251, seed * 7 % 251, seed * 31 % 251


def export(root: Path, layout: str, subjects: Sequence[Subject], copies: int, *, seed: int = 0, **settings: Any) -> ExportFolder:
    return ExportFolder(root, layout_named(layout), Plan(tuple(subjects), copies, seed), settings)


def complete(folder: ExportFolder, batch: int = 4, artist: Any = None) -> ExportFolder:
    folder.begin()
    folder.draw_missing(artist or Painter(), batch=batch)
    folder.finish()
    return folder


def prompts_file(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_adm_is_one_array_in_the_order_of_the_numbers_with_the_classes_in_turn(tmp_path: Path) -> None:
    folder = complete(export(tmp_path / "x", "adm", CLASSES, 4))
    # as the evaluator reads it: the header of version 1.0 or 2.0, then raw bytes batch by batch
    with zipfile.ZipFile(tmp_path / "x" / "samples.npz") as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) in ((1, 0), (2, 0))
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        assert (shape, is_fortran, dtype) == ((12, 4, 6, 3), False, np.uint8)
        pixels = np.frombuffer(file.read(), dtype).reshape(shape)
        assert file.read() == b""
    assert [tuple(one[0, 0].tolist()) for one in pixels] == [colour(picture.seed) for picture in folder.plan]
    loaded = np.load(tmp_path / "x" / "samples.npz")
    assert set(loaded) == {"arr_0", "arr_1"}
    assert loaded["arr_1"].tolist() == [3, 5, 8] * 4, "every stretch of the Inception score holds all classes"
    assert loaded["arr_1"].dtype == np.int64


@pytest.mark.parametrize(
    "drawn, reference",
    [
        (Drawn(1000, 256), "VIRTUAL_imagenet256_labeled.npz"), (Drawn(1000, 512), "VIRTUAL_imagenet512.npz"), (Drawn(1000, 1024), None),
        (Drawn(10, 256), None), (Drawn(), None),
    ],
    ids=str,
)  # fmt: skip
def test_adm_is_scored_against_imagenet_only_where_that_was_drawn(drawn: Drawn, reference: str | None) -> None:
    said = layout_named("adm").scoring(Path("x"), drawn)
    assert f"evaluator.py {reference or 'REFERENCE.npz'} " in said
    assert ("no published batch holds them" in said) == (reference is None)
    assert ("of what the prompts describe" in said) == (drawn.n_classes is None)


def test_adm_of_prompts_has_no_classes(tmp_path: Path) -> None:
    complete(export(tmp_path / "x", "adm", [Subject(text="a"), Subject(text="b")], 1))
    assert set(np.load(tmp_path / "x" / "samples.npz")) == {"arr_0"}


def test_geneval_has_a_folder_per_prompt_with_its_own_line_and_four_samples(tmp_path: Path) -> None:
    subjects = read_subjects(LAYOUTS["geneval"], labels=None, prompts=prompts_file(tmp_path / "evaluation_metadata.jsonl", "\n".join(GENEVAL) + "\n"))
    complete(export(tmp_path / "x", "geneval", subjects, LAYOUTS["geneval"].copies))
    root, seen = tmp_path / "x" / "images", {}
    for sub in root.iterdir():
        assert sub.is_dir()
        assert sub.name.isdigit()
        with (sub / "metadata.jsonl").open() as file:
            metadata = json.load(file)
        names = [path.name for path in (sub / "samples").iterdir() if re.match(r"\d+\.png", path.name)]
        seen[sub.name] = metadata["tag"], metadata["prompt"], sorted(names)
    samples = ["0000.png", "0001.png", "0002.png", "0003.png"]
    expected = {"00000": ("single_object", "a photo of a bench", samples), "00001": ("colors", "a photo of a blue café", samples)}
    assert seen == expected
    assert (root / "00001" / "metadata.jsonl").read_text() == GENEVAL[1] + "\n", "copied, not written anew"


def test_hpsv2_finds_a_jpeg_for_every_prompt_of_every_style_and_nothing_else(tmp_path: Path) -> None:
    lists = {"anime": ["a", "b"], "photo": ["c"]}
    for style, prompts in lists.items():
        prompts_file(tmp_path / "benchmark" / f"{style}.json", prompts)
    prompts_file(tmp_path / "benchmark" / "drawbench.json", ["not one of the styles"])
    subjects = read_subjects(LAYOUTS["hpsv2"], labels=None, prompts=tmp_path / "benchmark")
    folder = complete(export(tmp_path / "x", "hpsv2", subjects, 1))
    root = tmp_path / "x" / "images"
    assert sorted(path.name for path in root.iterdir()) == ["anime", "photo"], "the script takes every entry for a style"
    for style, prompts in lists.items():
        for i in range(len(prompts)):
            with Image.open(root / style / f"{i:05d}.jpg") as picture:
                assert picture.format == "JPEG"
    assert [picture.subject.text for picture in folder.plan] == ["a", "b", "c"]
    [alone] = read_subjects(LAYOUTS["hpsv2"], labels=None, prompts=tmp_path / "benchmark" / "photo.json")
    assert alone == subjects[2]


def test_imagereward_counts_its_files_and_finds_each_by_id(tmp_path: Path) -> None:
    listed = [{"id": "005695-0057", "prompt": "a fox"}, {"id": "000001-0002", "prompt": "a “hare”"}]
    subjects = read_subjects(LAYOUTS["imagereward"], labels=None, prompts=prompts_file(tmp_path / "p.json", listed))
    complete(export(tmp_path / "x", "imagereward", subjects, 3))
    prompts = json.loads((tmp_path / "x" / "prompts.json").read_text(encoding="utf-8"))
    assert prompts == listed
    files = {path.name for path in (tmp_path / "x" / "images").iterdir()}
    per_prompt = len(files) // len(prompts)
    assert per_prompt == 3
    assert files == {f"{record['id']}_{i}.png" for record in prompts for i in range(per_prompt)}


def test_every_picture_is_listed_with_what_makes_it_again(tmp_path: Path) -> None:
    folder = complete(export(tmp_path / "x", "folder", CLASSES, 2, seed=3))
    rows = [json.loads(line) for line in (tmp_path / "x" / "pictures.jsonl").read_text().splitlines()]
    assert [(row["number"], row["label"]) for row in rows] == [(i, (3, 5, 8)[i % 3]) for i in range(6)]
    for row in rows:
        with Image.open(tmp_path / "x" / row["file"]) as picture:
            assert picture.getpixel((0, 0)) == colour(row["seed"])
    assert len({row["seed"] for row in rows}) == 6
    assert not {picture.seed for picture in folder.plan} & {picture.seed for picture in Plan(CLASSES, 2, 4)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stopped_export_draws_the_rest_alone_and_ends_the_same(tmp_path: Path, layout: str) -> None:
    subjects = [Subject(text=f"t{i}", key=f"{i:05d}", line="{}") for i in range(10)]
    whole = complete(export(tmp_path / "whole", layout, subjects, 1), batch=10)
    stopped = export(tmp_path / "stopped", layout, subjects, 1)
    stopped.begin()
    saved = 0

    def stop() -> None:
        nonlocal saved
        saved += 1
        if saved == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.draw_missing(Painter(), batch=4, on_saved=stop)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "stopped" / "images").rglob("*.*g")}
    again = export(tmp_path / "stopped", layout, subjects, 1)
    assert again.n_done() == 6
    painter = Painter()
    complete(again, artist=painter)
    assert painter.asked == [[4, 5, 6, 7], [8, 9]], "a batch that lacks a picture is drawn as it was"
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items()), "finished pictures stay"
    assert contents(whole.root) == contents(again.root)


def contents(root: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file() and path.suffix != ".npz"}
    return found | {f"{path.name}:{name}": array.tobytes() for path in root.glob("*.npz") for name, array in np.load(path).items()}


def test_a_picture_that_could_not_be_written_whole_is_not_among_the_pictures(tmp_path: Path) -> None:
    class Half:
        def save(self, path: Path) -> None:
            path.write_bytes(b"\x89PNG")
            raise OSError("no space left on device")

    folder = export(tmp_path / "x", "imagereward", [Subject(text="t", key="a")], 1)
    folder.begin()
    with pytest.raises(OSError, match="no space"):
        folder.save(folder.plan.picture(0), Half())
    assert not list((tmp_path / "x" / "images").iterdir()), "ImageReward counts whatever lies there"


def test_other_settings_in_the_same_folder_are_named(tmp_path: Path) -> None:
    complete(export(tmp_path / "x", "folder", CLASSES, 1, seed=0, methods=[], top_k=900))
    with pytest.raises(AccelError, match=r"other settings: methods was \[\] and is \[.*h2o.*\] now.*another --out"):
        export(tmp_path / "x", "folder", CLASSES, 1, methods=[{"h2o": {"keep": 0.3}}], top_k=900)
    assert export(tmp_path / "x", "folder", CLASSES, 1, methods=[], top_k=900).n_done() == 3


def test_before_the_first_picture_settings_may_be_mended_and_leave_nothing_behind(tmp_path: Path) -> None:
    export(tmp_path / "x", "geneval", [Subject(text="t", key=f"{i:05d}", line="{}") for i in range(3)], 1, prompts="a").begin()
    complete(export(tmp_path / "x", "geneval", [Subject(text="t", key="00000", line="{}")], 1, prompts="b"))
    assert [path.name for path in (tmp_path / "x" / "images").iterdir()] == ["00000"], "an empty prompt folder would end the script"


@pytest.mark.parametrize("config", [None, "command: run\n", "[1"], ids=["none", "a_run", "broken"])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, config: str | None) -> None:
    (tmp_path / "note.txt").write_text("mine")
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(AccelError, match=r"--out|cannot read the settings"):
        export(tmp_path, "folder", CLASSES, 1)


def test_the_array_can_stand_for_the_pictures(tmp_path: Path) -> None:
    folder = complete(export(tmp_path / "x", "adm", CLASSES, 2))
    folder.finish(archive_only=True)
    assert not list((tmp_path / "x" / "images").iterdir())
    assert export(tmp_path / "x", "adm", CLASSES, 2).n_done() == 6
    with pytest.raises(AccelError, match="top_k was None and is 5 now"):
        export(tmp_path / "x", "adm", CLASSES, 2, top_k=5)


def test_a_damaged_or_odd_picture_is_named_instead_of_going_into_the_array(tmp_path: Path) -> None:
    folder = export(tmp_path / "x", "adm", CLASSES, 1)
    folder.begin()
    folder.draw_missing(Painter(), batch=2)
    odd = tmp_path / "x" / "images" / "000001.png"
    Image.new("RGB", (5, 5)).save(odd)
    with pytest.raises(AccelError, match=r"000001.png and 000000.png are 5×5 and 6×4 pixels"):
        folder.finish()
    odd.write_bytes(b"\x89PNG")
    with pytest.raises(AccelError, match=r"cannot read the picture .*000001.png"):
        folder.finish()
    assert not folder.has_archive
    odd.unlink()
    complete(folder)
    assert len(np.load(tmp_path / "x" / "samples.npz")["arr_0"]) == 3


def test_the_array_is_written_one_picture_at_a_time(tmp_path: Path) -> None:
    Image.new("RGB", (256, 256)).save(tmp_path / "a.png")
    peaks = []
    for n in (4, 200):
        tracemalloc.start()
        write_npz(tmp_path / "a.npz", [tmp_path / "a.png"] * n, None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 256 * 256 * 3, "200 pictures would be 39 million bytes"


@pytest.mark.parametrize(
    ("layout", "name", "value", "message"),
    [
        ("geneval", "p.txt", "a photo", "geneval takes GenEval's evaluation_metadata.jsonl"),
        ("geneval", "p.jsonl", f"{GENEVAL[0]}\n{{oops", "line 2 is not JSON"),
        ("geneval", "p.jsonl", '{"prompt": "a photo"}', "line 1: expected an object with the texts 'tag' and 'prompt'"),
        ("geneval", "p.jsonl", "", "holds no prompts"),
        ("hpsv2", "p.json", {"anime": ["a"]}, "must hold a list of prompts"),
        ("hpsv2", "p.json", "[", "is not JSON"),
        ("imagereward", "p.json", ["a"], "entry 0: expected an object with the texts 'id' and 'prompt'"),
        ("imagereward", "p.json", [{"id": "../a", "prompt": "a"}], "cannot name a file"),
        ("imagereward", "p.json", [{"id": "a", "prompt": "a"}] * 2, "there twice"),
        ("folder", "p.txt", "a\n\nb\n", "prompt 1, counted from 0, is empty"),
        ("folder", "p.csv", "a", "takes a .txt file"),
        ("folder", "p.json", [{"text": "a"}], "entry 0: expected an object with the texts 'prompt'"),
        ("folder", "p.json", {"a": 1}, "must hold a list"),
        ("adm", "none/p.txt", None, "there are no prompts"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 12 else "",
)
def test_a_malformed_prompts_file_explains_itself(tmp_path: Path, layout: str, name: str, value: Any, message: str) -> None:
    path = tmp_path / name if value is None else prompts_file(tmp_path / name, value)
    with pytest.raises(OptionError, match=re.escape(message)):
        read_subjects(LAYOUTS[layout], labels=None, prompts=path)


def test_plain_prompts_are_read_from_text_and_json(tmp_path: Path) -> None:
    lines = '"one"\n{"prompt": "two\u2028b"}\n'
    for name, value in (("a.txt", "one\ntwo\u2028b\n"), ("b.json", ["one", {"prompt": "two\u2028b"}]), ("c.jsonl", lines)):
        found = read_subjects(LAYOUTS["folder"], labels=None, prompts=prompts_file(tmp_path / name, value))
        assert [subject.text for subject in found] == ["one", "two\u2028b"]


def test_a_layout_or_subject_that_does_not_fit_explains_itself(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="did you mean 'geneval'"):
        layout_named("gen-eval")
    for name in ("geneval", "hpsv2", "imagereward"):
        with pytest.raises(OptionError, match="about texts, not classes"):
            read_subjects(LAYOUTS[name], labels=[1], prompts=None)
    for labels, prompts in ((None, None), ([1], "p.txt")):
        with pytest.raises(OptionError, match="and not both"):
            read_subjects(LAYOUTS["adm"], labels=labels, prompts=prompts)
    with pytest.raises(OptionError, match=r"holds none of anime\.json"):
        read_subjects(LAYOUTS["hpsv2"], labels=None, prompts=tmp_path)
    with pytest.raises(OptionError, match="nothing to draw"):
        Plan(CLASSES, 0)
