from __future__ import annotations

import errno
import io
import tracemalloc
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ofa_deploy import dataset
from ofa_deploy.dataset import (
    ImageSet,
    load_images,
    read_image_by,
    split_validation,
)
from ofa_deploy.errors import DataError
from ofa_deploy.preprocess import as_rgb
from tests.support import tiny

DATA = tiny.images(per_class=3, seed=2)
SUFFIXES = "(.jpg, .jpeg, .png, .bmp, .webp)"


def png(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


GREY = png(np.full((12, 12, 3), 90, dtype=np.uint8))
SMALLER = png(np.full((8, 10, 3), 90, dtype=np.uint8))


def class_files(data: ImageSet) -> dict[str, bytes]:
    """A data set as files in class folders."""
    return {
        f"{data.class_names[label]}/{index:03}.png": png(image)
        for index, (image, label) in enumerate(
            zip(data.images, data.labels, strict=True)
        )
    }


def write_folder(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def refusal(path: Path, *, skip_bad: bool = False) -> str:
    with pytest.raises(DataError) as caught:
        load_images(path, skip_bad=skip_bad)
    return str(caught.value)


def assert_same(found: ImageSet, expected: ImageSet) -> None:
    assert found.class_names == expected.class_names
    assert np.array_equal(found.labels, expected.labels)
    assert np.array_equal(found.images, expected.images)


def in_label_order(data: ImageSet) -> ImageSet:
    return data.take(np.argsort(data.labels, kind="stable"))


# -- three kinds of files --------------------------------------------------------------


def test_a_folder_gives_the_images_in_it(tmp_path: Path) -> None:
    data, left_out = load_images(write_folder(tmp_path / "data", class_files(DATA)))
    assert_same(data, in_label_order(DATA))
    assert left_out == ()


def test_a_zip_gives_the_images_in_it(tmp_path: Path) -> None:
    data, _ = load_images(write_zip(tmp_path / "data.zip", class_files(DATA)))
    assert_same(data, in_label_order(DATA))


def test_an_npz_gives_the_images_in_it(tmp_path: Path) -> None:
    path = write_npz(
        tmp_path / "data.npz",
        images=DATA.images,
        labels=DATA.labels,
        class_names=np.array(DATA.class_names),
    )
    assert_same(load_images(path)[0], DATA)


def test_a_zip_of_a_folder_of_class_folders_gives_the_same(tmp_path: Path) -> None:
    files = {f"photos/train/{name}": c for name, c in class_files(DATA).items()}
    data, _ = load_images(write_zip(tmp_path / "data.zip", files))
    assert_same(data, in_label_order(DATA))


def test_folder_and_zip_agree_on_the_order_whatever_the_names(tmp_path: Path) -> None:
    files = {f"{c}/{i}.png": GREY for c in ("a", "a b", "a-b") for i in (1, 2)}
    files["a/1.png"] = png(np.full((12, 12, 3), 7, dtype=np.uint8))
    folder, _ = load_images(write_folder(tmp_path / "data", files))
    zipped, _ = load_images(write_zip(tmp_path / "data.zip", files))
    assert_same(zipped, folder)


def test_classes_are_labelled_in_the_order_of_their_names(tmp_path: Path) -> None:
    files = {"zebra/1.png": GREY, "ant/1.png": GREY, "Bee/1.png": GREY}
    data, _ = load_images(write_folder(tmp_path / "data", files))
    assert data.class_names == ("Bee", "ant", "zebra")


def test_an_npz_without_names_numbers_its_classes(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "data.npz", images=DATA.images, labels=DATA.labels)
    assert load_images(path)[0].class_names == ("class 0", "class 1", "class 2")


def test_grey_images_become_three_channels(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 55, dtype=np.uint8)).save(buffer, format="PNG")
    files = {"a/1.png": buffer.getvalue(), "b/1.png": buffer.getvalue()}
    data, _ = load_images(write_folder(tmp_path / "data", files))
    assert np.array_equal(data.images, np.full((2, 4, 4, 3), 55, dtype=np.uint8))


def test_files_that_are_no_images_by_name_are_ignored(tmp_path: Path) -> None:
    files = {**class_files(DATA), "blue/notes.txt": b"x", "README": b"x"}
    data, left_out = load_images(write_folder(tmp_path / "data", files))
    assert (len(data), left_out) == (len(DATA), ())


LITTER = {
    ".DS_Store": b"x",
    ".thumbnails/1.png": GREY,
    "__MACOSX/blue/._000.png": b"x",
    "__MACOSX/._1.png": b"x",
    "blue/._000.png": b"x",
    "red/.hidden.png": b"x",
}


def test_a_folder_with_the_litter_of_macos_gives_the_images_in_it(
    tmp_path: Path,
) -> None:
    root = write_folder(tmp_path / ".cache" / "data", {**class_files(DATA), **LITTER})
    data, left_out = load_images(root)
    assert_same(data, in_label_order(DATA))
    assert left_out == ()


def test_a_zip_with_the_litter_of_macos_gives_the_images_in_it(tmp_path: Path) -> None:
    folders = {"__MACOSX/": b"", "__MACOSX/green/": b"", "blue/.empty/": b""}
    files = {**class_files(DATA), **LITTER, **folders, "red/.git/1.png": GREY}
    data, left_out = load_images(write_zip(tmp_path / "data.zip", files))
    assert_same(data, in_label_order(DATA))
    assert left_out == ()


def test_a_zip_of_names_that_begin_with_a_dot_and_a_slash_is_read(
    tmp_path: Path,
) -> None:
    files = {f"./{name}": content for name, content in class_files(DATA).items()}
    data, _ = load_images(write_zip(tmp_path / "data.zip", files))
    assert_same(data, in_label_order(DATA))


def test_progress_ends_below_or_at_the_total(tmp_path: Path) -> None:
    files = {f"{c}/{i:03}.png": GREY for c in ("a", "b") for i in range(300)}
    seen: list[tuple[int, int]] = []
    load_images(
        write_zip(tmp_path / "data.zip", files),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(500, 600)]


# -- what is wrong with a data set -----------------------------------------------------


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "missing"
    assert refusal(path) == (
        f"{path} does not exist; give a folder, .zip or .npz of images"
    )


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.tar"
    path.write_bytes(b"tar")
    assert refusal(path) == (
        f"{path} is neither a folder, a .zip nor an .npz file; give one of these"
    )


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_classes_are_refused(count: int, tmp_path: Path) -> None:
    files = {"blue/1.png": GREY} if count else {"1.png": GREY}
    assert refusal(write_folder(tmp_path / "data", files)) == (
        f"data has {count} class folders; at least 2 are needed, each with images "
        f"{SUFFIXES}"
    )


EMPTY = "no readable images in class 'green'; add some or remove the folder"


def test_an_empty_class_folder_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", {"blue/1.png": GREY, "red/1.png": GREY})
    (folder / "green").mkdir()
    assert refusal(folder) == f"data: {EMPTY}"


def test_an_empty_class_folder_in_a_zip_is_refused(tmp_path: Path) -> None:
    files = {"blue/1.png": GREY, "red/1.png": GREY, "green/": b""}
    assert refusal(write_zip(tmp_path / "data.zip", files)) == f"data.zip: {EMPTY}"


def damaged(data: ImageSet) -> dict[str, bytes]:
    files = class_files(data)
    files["blue/broken.png"] = GREY[:40]
    files["red/text.jpg"] = b"not an image"
    return files


def test_unreadable_images_are_counted_and_named(tmp_path: Path) -> None:
    assert refusal(write_folder(tmp_path / "data", damaged(DATA))) == (
        "data: 2 of 11 images cannot be read (blue/broken.png, red/text.jpg); repair "
        "or remove them; train --skip-bad leaves them out"
    )


def test_a_member_that_unpacks_to_more_than_an_image_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "MAX_IMAGE_BYTES", 10_000)
    files = {**class_files(DATA), "red/bomb.png": GREY + bytes(10_000)}
    path = write_zip(tmp_path / "data.zip", files)
    assert refusal(path).startswith(
        "data.zip: 1 of 10 images cannot be read (red/bomb.png); repair or remove them"
    )
    assert load_images(path, skip_bad=True)[1] == ("red/bomb.png",)


def test_a_member_that_says_less_than_it_unpacks_to_is_not_unpacked_whole(
    tmp_path: Path,
) -> None:
    whole = 64_000_000
    path = write_zip(tmp_path / "data.zip", class_files(DATA))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("red/bomb.png", bytes(whole))
    # Its size is in the archive's directory, and before its content.
    content = path.read_bytes()
    assert content.count(whole.to_bytes(4, "little")) == 2
    forged = content.replace(whole.to_bytes(4, "little"), (900).to_bytes(4, "little"))
    path.write_bytes(forged)
    tracemalloc.start()
    assert "(red/bomb.png)" in refusal(path)
    assert tracemalloc.get_traced_memory()[1] < whole / 10
    tracemalloc.stop()


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_member_whose_unpacking_cannot_be_stopped_is_not_read(
    packing: int, tmp_path: Path
) -> None:
    path = write_zip(tmp_path / "data.zip", class_files(DATA))
    with zipfile.ZipFile(path, "a", packing) as archive:
        archive.writestr("red/more.png", GREY)
        with pytest.raises(DataError, match="pack the images anew"):
            dataset.read_image(archive, "red/more.png")
    assert "(red/more.png)" in refusal(path)


def test_a_digest_needs_no_copy_of_the_images() -> None:
    images = np.zeros((4000, 20, 20, 3), np.uint8)
    data = ImageSet(images=images, labels=np.zeros(4000, int), class_names=("one",))
    tracemalloc.start()
    plain, strided = data.sha256, replace(data, images=images[:, :, ::-1]).sha256
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert plain == strided
    assert peak < 1.1 * images.nbytes  # of those that do not lie in order
    tracemalloc.start()
    assert data.sha256 == plain
    assert tracemalloc.get_traced_memory()[1] < 0.1 * images.nbytes
    tracemalloc.stop()


def test_a_class_without_a_name_is_refused() -> None:
    """Nothing that is written could be read again."""
    names = ("red", "", "blue")
    with pytest.raises(DataError, match="class 1 has an empty name; give every class"):
        replace(DATA, class_names=names)


def test_of_many_unreadable_images_the_first_five_are_named(tmp_path: Path) -> None:
    files = {**class_files(DATA), **{f"red/x{i}.png": b"x" for i in range(7)}}
    assert refusal(write_folder(tmp_path / "data", files)) == (
        "data: 7 of 16 images cannot be read (red/x0.png, red/x1.png, red/x2.png, "
        "red/x3.png, red/x4.png, …); repair or remove them; train --skip-bad leaves "
        "them out"
    )


def test_unreadable_images_are_left_out_on_request(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "data", damaged(DATA))
    data, left_out = load_images(path, skip_bad=True)
    assert_same(data, in_label_order(DATA))
    assert left_out == ("blue/broken.png", "red/text.jpg")


def test_an_image_that_cannot_be_read_today_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tomorrow the same folder would hold other training data."""
    root = write_folder(tmp_path / "data", class_files(DATA))
    read_bytes, failing = Path.read_bytes, sorted(root.glob("*/*"))[3]

    def read(path: Path) -> bytes:
        if path == failing:
            raise OSError(errno.EIO, "Input/output error")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    for skip_bad in (True, False):
        told = refusal(root, skip_bad=skip_bad)
        assert failing.name in told
        assert "cannot be read: [Errno 5] Input/output error. Check its perm" in told


def test_an_image_that_is_not_there_is_as_one_that_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        read_image_by((tmp_path / "gone.png").read_bytes, name="gone.png")


def test_what_is_no_file_is_as_an_image_that_is_damaged(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data", class_files(DATA))
    (root / "blue" / "a folder.png").mkdir()
    assert "1 of 10 images cannot be read (blue/a folder.png)" in refusal(root)
    data, bad = load_images(root, skip_bad=True)
    assert_same(data, in_label_order(DATA))
    assert bad == ("blue/a folder.png",)


def test_a_damaged_member_is_as_an_image_that_is_damaged() -> None:
    def read() -> bytes:
        raise OSError("Invalid data stream")  # as bz2 says it, without a number

    with pytest.raises(ValueError, match="Invalid data stream"):
        read_image_by(read, name="a.png")


def test_memory_that_is_full_is_no_damage() -> None:
    def read() -> bytes:
        raise MemoryError

    with pytest.raises(MemoryError):
        read_image_by(read, name="a.png")


def test_a_class_of_unreadable_images_alone_is_refused(tmp_path: Path) -> None:
    files = {"blue/1.png": GREY, "red/1.png": GREY, "green/1.png": b"x"}
    path = write_folder(tmp_path / "data", files)
    assert refusal(path, skip_bad=True) == f"data: {EMPTY}"


def test_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    files = {"blue/1.png": GREY, "red/1.png": SMALLER}
    assert refusal(write_folder(tmp_path / "data", files)) == (
        "data: images have 2 different sizes (10×8, 12×12); resize them to one size "
        "first"
    )


def test_a_zip_whose_paths_lead_outside_writes_nothing(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    names = ("../evil/1.png", "/etc/evil/1.png", "blue/../../evil/2.png")
    files = {**class_files(DATA), **dict.fromkeys(names, GREY)}
    load_images(write_zip(inside / "data.zip", files))
    assert [p.name for p in tmp_path.rglob("*")] == ["inside", "data.zip"]


def test_a_damaged_zip_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "data.zip", class_files(DATA))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert refusal(path) == (
        f"{path} is neither a folder, a .zip nor an .npz file; give one of these"
    )


def test_a_zip_whose_directory_is_damaged_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "data.zip", class_files(DATA))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02")] ^= 0xFF
    path.write_bytes(content)
    told = refusal(path)
    assert told.startswith(f"{path} cannot be read as .zip: ")
    assert told.endswith("; pack it anew")


def test_a_zip_that_holds_a_class_in_two_folders_is_refused(tmp_path: Path) -> None:
    files = class_files(DATA)
    both = {f"{part}/{k}": v for part in ("test", "train") for k, v in files.items()}
    path = write_zip(tmp_path / "data.zip", both)
    first = min(name.split("/")[0] for name in files)
    assert refusal(path) == (
        f"data.zip: class {first!r} is in folder test and in train; pack one of them "
        "alone"
    )


def test_files_beside_the_class_folders_of_a_zip_are_no_class(tmp_path: Path) -> None:
    files = class_files(DATA)
    files["./cover.png"] = next(iter(files.values()))
    found, _ = load_images(write_zip(tmp_path / "data.zip", files))
    assert_same(found, in_label_order(DATA))


def test_a_picture_among_the_class_folders_is_of_no_class(tmp_path: Path) -> None:
    files = {f"set/{name}": content for name, content in class_files(DATA).items()}
    files["set/preview.png"] = SMALLER
    higher = {f"all/{name}": content for name, content in files.items()}
    higher["all/preview.png"] = SMALLER
    zipped, _ = load_images(write_zip(tmp_path / "data.zip", higher))
    assert_same(zipped, in_label_order(DATA))
    zipped, _ = load_images(write_zip(tmp_path / "data.zip", files))
    folder, _ = load_images(write_folder(tmp_path / "data", files) / "set")
    assert_same(zipped, folder)
    assert_same(zipped, in_label_order(DATA))


@pytest.mark.parametrize("deeper", ["more", "more/and/more"])
def test_images_in_a_folder_in_a_class_folder_are_refused(
    tmp_path: Path, deeper: str
) -> None:
    files = class_files(DATA)
    first = min(name.split("/")[0] for name in files)
    files[f"{first}/{deeper}/1.png"] = GREY
    told = (
        f"class {first!r} has images in {first}/{deeper}, a folder of its own; put "
        "them beside its others, or take them out; if its folders are the classes, "
        f"give {first} alone"
    )
    assert refusal(write_folder(tmp_path / "data", files)) == f"data: {told}"
    assert refusal(write_zip(tmp_path / "data.zip", files)) == f"data.zip: {told}"


def test_a_folder_that_is_one_too_high_is_told(tmp_path: Path) -> None:
    files = {f"train/{name}": content for name, content in class_files(DATA).items()}
    folder = write_folder(tmp_path / "data", files)
    assert refusal(folder) == (
        "data: train holds no images itself, but folders that do; if these are the "
        f"classes, give {folder / 'train'}"
    )


# -- kinds of images -------------------------------------------------------------------


def test_greys_of_16_bits_are_those_of_their_8_higher_bits(tmp_path: Path) -> None:
    levels = np.arange(144, dtype=np.uint16).reshape(12, 12) * 400
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, format="PNG")
    files = {"a/1.png": buffer.getvalue(), "b/1.png": GREY}
    data, _ = load_images(write_folder(tmp_path / "data", files))
    assert np.array_equal(data.images[0], np.repeat(levels[:, :, None] >> 8, 3, 2))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_numbers_of_no_known_range_are_no_greys(dtype: type) -> None:
    with pytest.raises(DataError, match="has no range of grey values"):
        as_rgb(Image.fromarray(np.full((4, 4), 200, dtype=dtype)))


def test_an_image_set_takes_what_people_have() -> None:
    natural: Any = {
        "images": DATA.images,
        "labels": [int(label) for label in DATA.labels],
        "class_names": [name.encode() for name in DATA.class_names],
    }
    found = ImageSet(**natural)
    assert found.sha256 == DATA.sha256
    assert found.class_names == DATA.class_names
    assert found.labels.dtype == np.int64
    natural["labels"] = DATA.labels.astype(np.uint8)
    assert ImageSet(**natural).sha256 == DATA.sha256
    natural["labels"] = DATA.labels / 1
    with pytest.raises(DataError, match="labels must be integers; got float64"):
        ImageSet(**natural)
    natural |= {"images": [DATA.images[0], DATA.images[1][:-1]], "labels": [0, 1]}
    with pytest.raises(DataError, match="images must be of one size"):
        ImageSet(**natural)


# -- npz files -------------------------------------------------------------------------

IMAGES = np.zeros((4, 6, 6, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 0, 1])
NEEDED = "it needs `images` (count, height, width, 3) uint8 and `labels` (count,)"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, f"{{path}} has no array labels; {NEEDED}"),
        ({"x": IMAGES}, f"{{path}} has no array images, labels; {NEEDED}"),
        (
            {"images": IMAGES, "labels": LABELS[:3]},
            "4 images but labels of shape (3,)",
        ),
        (
            {"images": IMAGES, "labels": LABELS[:, None]},
            "{path}: labels must be integers of shape (count,); got int64 of shape "
            "(4, 1)",
        ),
        (
            {"images": IMAGES, "labels": LABELS + 0.5},
            "{path}: labels must be integers of shape (count,); got float64 of shape "
            "(4,)",
        ),
        (
            {"images": IMAGES.astype(np.float32), "labels": LABELS},
            "images must be uint8 of shape (count, height, width, 3); got float32 of "
            "shape (4, 6, 6, 3). Of pixels from 0 to 1 give (255 * "
            "images).astype('uint8')",
        ),
        (
            {"images": IMAGES[..., 0], "labels": LABELS},
            "images must be uint8 of shape (count, height, width, 3); got uint8 of "
            "shape (4, 6, 6)",
        ),
        (
            {"images": IMAGES[..., :1], "labels": LABELS},
            "images must have 3 channels in the last axis; got shape (4, 6, 6, 1)",
        ),
        (
            {"images": IMAGES, "labels": LABELS - 1},
            "labels go from -1 to 0, but there are 1 classes; allowed is 0..0",
        ),
        (
            {"images": IMAGES, "labels": LABELS, "class_names": np.array(["only"])},
            "labels go from 0 to 1, but there are 1 classes; allowed is 0..0",
        ),
        (
            {"images": IMAGES, "labels": LABELS * 0},
            "data.npz has 1 class folders; at least 2 are needed, each with images "
            f"{SUFFIXES}",
        ),
        (
            {"images": IMAGES, "labels": LABELS * 2},
            "data.npz: no readable images in class 'class 1'; add some or remove the "
            "folder",
        ),
        (
            {"images": IMAGES, "labels": LABELS * 10**12},
            "{path}: labels go up to 1000000000000, but there are only 4 images; "
            "number the classes from 0 on, each with images of its own",
        ),
        (
            {"images": IMAGES, "labels": LABELS.astype(np.uint64) * 2**63},
            "{path}: labels go up to 9223372036854775808, but there are only 4 "
            "images; number the classes from 0 on, each with images of its own",
        ),
        (
            {"images": IMAGES, "labels": LABELS, "class_names": np.array("cat")},
            "{path}: class_names must be texts of shape (classes,); got <U3 of shape "
            "()",
        ),
        (
            {"images": IMAGES, "labels": LABELS, "class_names": np.array([["a", "b"]])},
            "{path}: class_names must be texts of shape (classes,); got <U1 of shape "
            "(1, 2)",
        ),
        (
            {"images": IMAGES, "labels": LABELS, "class_names": np.array(["a", "a"])},
            "class 'a' is named more than once; give every class a name of its own",
        ),
        (
            {"images": IMAGES[:0], "labels": LABELS[:0]},
            "{path}: labels must be integers of shape (count,); got int64 of shape "
            "(0,)",
        ),
    ],
)
def test_an_npz_of_the_wrong_arrays_is_refused(
    arrays: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_npz(tmp_path / "data.npz", **arrays)
    assert refusal(path) == message.format(path=path)


def test_an_npz_that_would_run_code_is_refused(tmp_path: Path) -> None:
    objects = np.array([{"not": "an array"}], dtype=object)
    path = write_npz(tmp_path / "data.npz", images=objects, labels=LABELS)
    assert refusal(path).startswith(f"{path} cannot be read as .npz: ")


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_a_file_that_is_no_npz_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path} cannot be read as .npz: ")


# -- splitting -------------------------------------------------------------------------


def test_the_last_images_of_each_class_validate() -> None:
    data = replace(DATA, images=DATA.images.copy())
    _, validation = split_validation(data, fraction=0.34)
    last = [np.flatnonzero(data.labels == label)[-1] for label in range(3)]
    assert_same(validation, data.take(np.array(last)))


def test_a_split_leaves_no_image_out_and_none_in_both() -> None:
    numbers = np.arange(60, dtype=np.uint8).reshape(60, 1, 1, 1).repeat(3, axis=3)
    data = ImageSet(
        images=numbers, labels=np.arange(60) % 3, class_names=tiny.CLASS_NAMES
    )
    training, validation = split_validation(data, fraction=0.1)
    seen = np.concatenate([training.images, validation.images])[:, 0, 0, 0]
    assert sorted(seen) == list(range(60))
    assert len(validation) == 6


def test_a_class_too_small_to_split_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        split_validation(DATA, fraction=0.1)
    assert str(caught.value) == (
        "class 'blue' has 3 images: too few to hold out 10% for validation; give more "
        "images of it, or hold out another share"
    )
