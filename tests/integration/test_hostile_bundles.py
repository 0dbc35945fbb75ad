"""Files from elsewhere: what they may make us do is to refuse them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load, save

from ofa_deploy.bundle import Bundle
from ofa_deploy.errors import BundleError, DeployError, DigestMismatch, FormatError
from ofa_deploy.manifest import MAX_MANIFEST_BYTES, MAX_THREADS
from ofa_deploy.space_file import MAX_RESOLUTION
from ofa_deploy.stored import (
    ACCURACY_FILE,
    CALIBRATION_FILE,
    DESCRIPTION_FILE,
    FILES,
    SAMPLES_FILE,
    WEIGHTS_FILE,
    read_supernet,
    write_supernet,
)
from profilers.backends import backend_names
from tests.support import tiny, tiny_bundle

BACKENDS = ("onnxruntime-cpu", "openvino-cpu")
FILES_OF = {
    "onnxruntime-cpu": ["latency_samples.json", "model.onnx", "reference.safetensors"],
    "openvino-cpu": [
        "latency_samples.json",
        "model.bin",
        "model.onnx",
        "model.xml",
        "reference.safetensors",
    ],
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle per backend, and a supernet; not to be changed."""
    folder = tmp_path_factory.mktemp("originals")
    for backend in BACKENDS:
        tiny_bundle.write_bundle(folder / backend, backend=backend)
    write_supernet(folder / "supernet", tiny.stored())
    return folder


@pytest.fixture
def bundle(originals: Path, tmp_path: Path) -> Path:
    """A bundle to be changed."""
    return Path(shutil.copytree(originals / "onnxruntime-cpu", tmp_path / "bundle"))


@pytest.fixture
def supernet(originals: Path, tmp_path: Path) -> Path:
    """A supernet to be changed."""
    return Path(shutil.copytree(originals / "supernet", tmp_path / "supernet"))


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# -- files of a bundle -----------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bundle_has_these_files(backend: str, originals: Path) -> None:
    names = sorted(Bundle.open(originals / backend).manifest.files)
    assert names == FILES_OF[backend]


FILE_CASES = [(backend, name) for backend in BACKENDS for name in FILES_OF[backend]]


@pytest.mark.parametrize(("backend", "name"), FILE_CASES)
def test_a_changed_byte_is_seen(
    backend: str, name: str, originals: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(originals / backend, tmp_path / "bundle")
    recorded = Bundle.open(folder).manifest.files[name].sha256
    flip_a_byte(folder / name)
    actual = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    with pytest.raises(DigestMismatch) as caught:
        Bundle.open(folder)
    assert str(caught.value) == (
        f"{name} has sha256 {actual[:16]}…, the recorded one is {recorded[:16]}…; the "
        "file was changed or damaged. Restore it from where it came from; do not use "
        "it"
    )


@pytest.mark.parametrize(("backend", "name"), FILE_CASES)
def test_a_missing_file_is_seen(
    backend: str, name: str, originals: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(originals / backend, tmp_path / "bundle")
    (folder / name).unlink()
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    assert str(caught.value) == (
        f"{folder} lacks {name}, which its manifest lists; the bundle is not complete. "
        "Copy it again, or make it anew"
    )


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json"])
def test_a_link_is_not_followed(name: str, bundle: Path, tmp_path: Path) -> None:
    elsewhere = shutil.move(bundle / name, tmp_path / "elsewhere")
    try:
        (bundle / name).symlink_to(elsewhere)
    except OSError as error:  # Windows wants a right for it
        pytest.skip(f"no links here: {error}")
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle)
    assert str(caught.value) == (
        f"{bundle / name} is a link; a bundle's files are its own. Put the file that "
        "it leads to in its place, or copy the bundle again"
    )


def test_a_file_of_another_size_is_not_read(bundle: Path) -> None:
    size = (bundle / "model.onnx").stat().st_size
    os.truncate(bundle / "model.onnx", 10**12)  # sparse; more than any memory
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle)
    assert str(caught.value) == (
        f"model.onnx has 1000000000000 bytes, the manifest says {size}; the file was "
        "changed or damaged. Restore it from where it came from; do not use it"
    )


def test_weights_that_would_be_loaded_unlisted_are_refused(
    originals: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(originals / "openvino-cpu", tmp_path / "bundle"))
    rewrite_manifest(folder, drop("files", "model.bin"))
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    assert str(caught.value) == (
        f"{folder / 'model.bin'} would be loaded with model.xml, and the manifest does "
        "not list it; remove it, or copy the bundle again"
    )


def test_a_change_after_opening_is_seen_by_the_check(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    flip_a_byte(bundle / "model.onnx")
    with pytest.raises(DigestMismatch):
        opened.check()


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as caught:
        Bundle.open(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} is not a bundle: it has no manifest.json; give a folder that "
        "`ofa-deploy specialize` wrote"
    )


# -- the manifest ----------------------------------------------------------------------


def rewrite_manifest(bundle: Path, change: Callable[[Any], None]) -> None:
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def put(*path: str | int, value: object) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def drop(*path: str) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def refused_manifest(bundle: Path) -> FormatError:
    with pytest.raises(FormatError) as caught:
        Bundle.open(bundle)
    assert str(caught.value).startswith("manifest.json: ")
    return caught.value


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/b",
        "a\\b",
        "..\\evil",
        "C:evil",
        "model.onnx:stream",
        "model\n.onnx",
        "manifest.json",
    ],
)
def test_a_file_name_that_leads_elsewhere_is_refused(name: str, bundle: Path) -> None:
    record = {"sha256": "0" * 64, "size_bytes": 1}
    rewrite_manifest(bundle, put("files", name, value=record))
    error = refused_manifest(bundle)
    assert error.path == f"files[{json.dumps(name)}]"
    assert str(error).endswith(f"{name!r} is not a plain file name inside the bundle")


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "model.xml", "reference.safetensors"]
)
def test_a_model_that_the_runtime_does_not_load_is_refused(
    name: str, bundle: Path
) -> None:
    rewrite_manifest(bundle, put("model_file", value=name))
    assert str(refused_manifest(bundle)) == (
        f"manifest.json: model_file: {name!r} is not what onnxruntime-cpu loads, which "
        "is 'model.onnx'"
    )


def test_a_model_that_is_not_among_the_files_is_refused(bundle: Path) -> None:
    rewrite_manifest(bundle, drop("files", "model.onnx"))
    assert str(refused_manifest(bundle)) == (
        "manifest.json: model_file: 'model.onnx' is not among the files, "
        "latency_samples.json, reference.safetensors"
    )


def test_a_manifest_that_is_too_large_is_not_read(bundle: Path) -> None:
    os.truncate(bundle / "manifest.json", MAX_MANIFEST_BYTES + 1)
    assert str(refused_manifest(bundle)) == (
        "manifest.json: 16000001 bytes are no manifest's, which has at most 16000000; "
        "the bundle is damaged, make it anew"
    )


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (put("surprise", value=1), ""),
        (put("measured", "surprise", value=1), "measured"),
        (put("accuracy", "surprise", value=1), "accuracy"),
        (put("files", "model.onnx", "surprise", value=1), 'files["model.onnx"]'),
        (drop("constraints"), ""),
        (drop("constraints", "percentile"), "constraints"),
        (drop("device", "arch"), "device"),
        (drop("normalisation", "std"), "normalisation"),
        *(
            (put("constraints", "latency_ms", value=bad), "constraints.latency_ms")
            for bad in ("2", True, -1)
        ),
        (put("constraints", "percentile", value=75), "constraints"),
        (put("constraints", "min_accuracy", value=2), "constraints"),
        (put("constraints", "latency_ms", value=None), "constraints"),
        (put("verdicts", value=[]), "verdicts"),
        (put("verdicts", 0, "limit", value=3.0), "verdicts"),
        (put("candidates", value={}), "candidates"),
        (put("candidates", value=[{"config_id": "r8"}]), "candidates[0]"),
        (put("verdicts", 0, "constraint", value="price"), "verdicts[0].constraint"),
        (put("verdicts", 0, "limit", value=0), "verdicts[0].limit"),
        (put("measured", "memory_mb", value=-1), "measured.memory_mb"),
        (
            put("measured", "anchor_reference_ns", value=0),
            "measured.anchor_reference_ns",
        ),
        (put("resolution", value=8.5), "resolution"),
        (put("resolution", value=0), "resolution"),
        (put("resolution", value=2**70), "resolution"),
        (put("resolution", value=MAX_RESOLUTION + 1), "resolution"),
        (put("class_names", value="blue"), "class_names"),
        (put("class_names", 0, value=0), "class_names[0]"),
        (put("normalisation", "std", 1, value=0), "normalisation.std[1]"),
        (put("normalisation", "mean", value=[1, 2]), "normalisation"),
        (put("files", value=[]), "files"),
        (
            put("files", "model.onnx", "size_bytes", value=10**12),
            'files["model.onnx"].size_bytes',
        ),
        (
            put("files", "model.onnx", "size_bytes", value=-1),
            'files["model.onnx"].size_bytes',
        ),
        (put("accuracy", "kind", value="hoped for"), "accuracy.kind"),
        (put("measured", "p90_ms", value=0), "measured.p90_ms"),
        (put("measured", "instability", value="none"), "measured.instability"),
        (put("runtime", "threads", value="two"), "runtime.threads"),
        (put("runtime", "threads", value=MAX_THREADS + 1), "runtime.threads"),
        (put("parity", "tolerance", value=0), "parity.tolerance"),
        (put("cost", "mac_count", value=0), "cost.mac_count"),
        (put("versions", "numpy", value=2), 'versions["numpy"]'),
    ],
)
def test_a_wrong_manifest_is_refused_with_its_place(
    change: Callable[[Any], None], where: str, bundle: Path
) -> None:
    rewrite_manifest(bundle, change)
    assert refused_manifest(bundle).path == where


def test_a_manifest_may_ask_for_the_most_that_is_allowed(bundle: Path) -> None:
    rewrite_manifest(bundle, put("resolution", value=MAX_RESOLUTION))
    rewrite_manifest(bundle, put("runtime", "threads", value=MAX_THREADS))
    manifest = Bundle.open(bundle).manifest
    asked = (manifest.resolution, manifest.runtime.threads)
    assert asked == (MAX_RESOLUTION, MAX_THREADS)


@pytest.mark.parametrize("version", [0, 1, 2, 3, 5, "4", None])
def test_another_format_version_is_refused(version: object, bundle: Path) -> None:
    rewrite_manifest(bundle, put("format_version", value=version))
    assert refused_manifest(bundle).path == "format_version"


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_no_json_is_refused(constant: str, bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_text(
        path.read_text().replace('"latency_ms": 2.0', f'"latency_ms": {constant}')
    )
    assert str(refused_manifest(bundle)) == (
        f"manifest.json: {constant} is not JSON; give a finite number; the bundle is "
        "damaged, make it anew"
    )


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000]
)
def test_a_manifest_that_is_no_document_is_refused(
    content: bytes, bundle: Path
) -> None:
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"^manifest\.json"):
        Bundle.open(bundle)


def test_a_manifest_survives_being_written_again(bundle: Path) -> None:
    text = (bundle / "manifest.json").read_text()
    assert Bundle.open(bundle).manifest.to_json() == text


# -- a manifest that is well formed and lies -------------------------------------------


def forge(bundle: Path, name: str, content: bytes) -> None:
    """Replace a file, and make the manifest say that it is right."""
    (bundle / name).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    record = {"sha256": digest, "size_bytes": len(content)}
    rewrite_manifest(bundle, put("files", name, value=record))


def refused_check(bundle: Path) -> str:
    with Bundle.open(bundle) as opened, pytest.raises(DeployError) as caught:
        opened.check()
    return str(caught.value)


def test_a_forged_model_fails_the_check(bundle: Path, originals: Path) -> None:
    other = tiny_bundle.write_bundle(
        bundle.parent / "other", config=tiny.random_configs(tiny.SPACE, 1)[0]
    )
    forge(bundle, "model.onnx", (other.path / "model.onnx").read_bytes())
    refused_check(bundle)


def test_a_model_that_is_no_model_fails_the_check(bundle: Path) -> None:
    forge(bundle, "model.onnx", b"not a model")
    assert refused_check(bundle).startswith("ONNX Runtime cannot ")


def mean_model(
    *,
    image: str = "image",
    logits: str = "logits",
    takes: tuple[int, ...] = (1, 3, 12, 12),
    gives: tuple[int, ...] = (1, 3),
    element: int = TensorProto.FLOAT,
) -> bytes:
    """A model whose outputs are all the mean of its input."""
    zeros = numpy_helper.from_array(np.zeros(gives, dtype=np.float32), "zeros")
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", [image], ["mean"], keepdims=0),
            helper.make_node("Add", ["mean", "zeros"], ["means"]),
            helper.make_node("Cast", ["means"], [logits], to=element),
        ],
        "forged",
        [helper.make_tensor_value_info(image, TensorProto.FLOAT, takes)],
        [helper.make_tensor_value_info(logits, element, gives)],
        [zeros],
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    return bytes(model.SerializeToString())


SPECIALIZED = "Give a model that `ofa-deploy specialize` exported"
FORGED_MODELS = [
    pytest.param(
        mean_model(image="x"),
        "the model takes {'x': (1, 3, 12, 12)}; 'image' of 4 axes belongs there. "
        f"{SPECIALIZED}",
        id="another input",
    ),
    pytest.param(
        mean_model(takes=(3,)),
        f"the model takes {{'image': (3,)}}; 'image' of 4 axes belongs there. "
        f"{SPECIALIZED}",
        id="an input of one axis",
    ),
    pytest.param(
        mean_model(logits="y"),
        "the model gives {'y': 'float32 (1, 3)'}; 'logits', numbers of shape "
        f"(n, classes), belongs there. {SPECIALIZED}",
        id="another output",
    ),
    pytest.param(
        mean_model(gives=()),
        "the model gives {'logits': 'float32 ()'}; 'logits', numbers of shape "
        f"(n, classes), belongs there. {SPECIALIZED}",
        id="an output without axes",
    ),
    pytest.param(
        mean_model(element=TensorProto.STRING),
        "the model gives {'logits': 'object (1, 3)'}; 'logits', numbers of shape "
        f"(n, classes), belongs there. {SPECIALIZED}",
        id="texts for outputs",
    ),
    pytest.param(
        mean_model(gives=(1, 4)),
        "class_names: the model gives outputs of shape (1, 4) for one image; the "
        "manifest names 3 classes. The bundle is damaged, make it anew",
        id="more classes",
    ),
    pytest.param(
        mean_model(gives=(2, 3)),
        "class_names: the model gives outputs of shape (2, 3) for one image; the "
        "manifest names 3 classes. The bundle is damaged, make it anew",
        id="outputs for two images",
    ),
    pytest.param(
        mean_model(takes=(1, 3, 9, 9)),
        "input 'image' is 1x3x12x12; the model takes 1x3x9x9; resize the array or "
        "export the model for this shape",
        id="another resolution",
    ),
]


@pytest.mark.parametrize(("content", "message"), FORGED_MODELS)
def test_a_model_that_does_not_fit_its_manifest_fails_the_check(
    content: bytes, message: str, bundle: Path
) -> None:
    forge(bundle, "model.onnx", content)
    assert refused_check(bundle) == message


@pytest.mark.parametrize(("content", "message"), FORGED_MODELS)
def test_a_model_that_does_not_fit_its_manifest_predicts_nothing(
    content: bytes, message: str, bundle: Path
) -> None:
    forge(bundle, "model.onnx", content)
    with Bundle.open(bundle) as opened, pytest.raises(DeployError) as caught:
        opened.predict(tiny.images(per_class=1).images[0])
    assert str(caught.value) == message


def raw_tensor(element: str, shape: list[int], data: bytes) -> bytes:
    """A safetensors file as nobody's library writes it."""
    entry = {"dtype": element, "shape": shape, "data_offsets": [0, len(data)]}
    header = json.dumps({"image": entry}).encode()
    return len(header).to_bytes(8, "little") + header + data


NO_TENSORS = {
    "empty": b"",
    "text": b"no tensors",
    "a type that numpy lacks": raw_tensor("BF16", [2], b"1234"),
    "too many axes": raw_tensor("U8", [1] * 100, b"1"),
    "an axis that is too long": raw_tensor("U8", [0, 2**63], b""),
}


@pytest.mark.parametrize(
    "content",
    [*NO_TENSORS.values(), save({"image": np.zeros(3, dtype=np.float32)})],
    ids=[*NO_TENSORS, "without outputs"],
)
def test_reference_outputs_that_are_none_fail_the_check(
    content: bytes, bundle: Path
) -> None:
    forge(bundle, "reference.safetensors", content)
    assert refused_check(bundle).startswith("reference.safetensors is damaged: ")


@pytest.mark.parametrize(
    ("images", "outputs"),
    [
        ((0, 3, 12, 12), (0, 3)),
        ((2, 3, 12, 12), (1, 3)),
        ((2, 3, 12, 12), (2, 4)),
        ((), (2, 3)),
        ((2, 3), (2, 3)),
    ],
    ids=["no images", "fewer outputs", "more classes", "no axes", "too few axes"],
)
def test_reference_outputs_of_another_shape_fail_the_check(
    images: tuple[int, ...], outputs: tuple[int, ...], bundle: Path
) -> None:
    reference = {
        "image": np.zeros(images, dtype=np.float32),
        "logits": np.zeros(outputs, dtype=np.float32),
    }
    forge(bundle, "reference.safetensors", save(reference))
    assert refused_check(bundle).startswith("reference.safetensors is damaged: ")


@pytest.mark.parametrize("element", [np.complex64, np.int64, np.bool_])
def test_reference_outputs_that_are_no_floats_fail_the_check(
    element: type[np.generic], bundle: Path
) -> None:
    reference = {
        "image": np.zeros((2, 3, 12, 12), dtype=np.float32),
        "logits": np.zeros((2, 3), dtype=element),
    }
    forge(bundle, "reference.safetensors", save(reference))
    assert refused_check(bundle).startswith("reference.safetensors is damaged: ")


def test_missing_reference_outputs_fail_the_check(bundle: Path) -> None:
    rewrite_manifest(bundle, drop("files", "reference.safetensors"))
    (bundle / "reference.safetensors").unlink()
    refused_check(bundle)


def test_a_runtime_that_is_unknown_fails_the_check(bundle: Path) -> None:
    rewrite_manifest(bundle, put("runtime", "backend", value="abacus"))
    assert refused_check(bundle) == (
        f"there is no backend 'abacus'; choose one of: {', '.join(backend_names())}"
    )


def test_class_names_that_do_not_fit_the_model_are_refused(bundle: Path) -> None:
    rewrite_manifest(bundle, put("class_names", value=["blue", "green"]))
    with Bundle.open(bundle) as opened, pytest.raises(DeployError):
        opened.predict(tiny.images(per_class=1).images[0])


# -- supernets -------------------------------------------------------------------------


def test_a_supernet_survives_its_folder(originals: Path) -> None:
    expected, found = tiny.stored(), read_supernet(originals / "supernet")
    assert found.space == expected.space
    assert found.weights.keys() == expected.weights.keys()
    for name, array in expected.weights.items():
        assert np.array_equal(found.weights[name], array), name
    assert found.class_names == expected.class_names
    assert found.normalisation == expected.normalisation


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_of_a_supernet_is_seen(name: str, supernet: Path) -> None:
    flip_a_byte(supernet / name)
    with pytest.raises(DigestMismatch, match=f"^{name} has sha256 "):
        read_supernet(supernet)


@pytest.mark.parametrize("name", FILES)
def test_a_cut_off_file_of_a_supernet_is_seen(name: str, supernet: Path) -> None:
    content = (supernet / name).read_bytes()
    (supernet / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DigestMismatch, match=f"^{name} has sha256 "):
        read_supernet(supernet)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_of_a_supernet_is_seen(name: str, supernet: Path) -> None:
    (supernet / name).unlink()
    with pytest.raises(FormatError, match=f"^supernet.json: {name} cannot be read: "):
        read_supernet(supernet)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (put("surprise", value=1), ""),
        (put("format_version", value=2), "format_version"),
        (drop("space"), ""),
        (put("space", "head", "class_count", value=4), "class_names"),
        (put("space", "stages", 0, "stride", value=5), "space"),
        (put("space", "name", value="../../evil"), "space.name"),
        (put("space", "name", value="/etc/evil"), "space.name"),
        (
            put("space", "stages", 1, "depths", value=[10**9]),
            "space.stages[1].depths[0]",
        ),
        (put("space", "resolutions", 1, value=10**9), "space.resolutions[1]"),
        (put("space", "head", "class_count", value=10**9), "space.head.class_count"),
        (put("space", "stem", "out_channels", value=16), "weights"),
        (put("class_names", value=[]), "class_names"),
        (put("normalisation", "std", 0, value=-1), "normalisation.std[0]"),
        (drop("files", WEIGHTS_FILE), "files"),
        (put("files", "../evil", value="0" * 64), "files"),
        (put("files", value={}), "files"),
    ],
)
def test_a_wrong_description_is_refused_with_its_place(
    change: Callable[[Any], None], where: str, supernet: Path
) -> None:
    path = supernet / DESCRIPTION_FILE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(FormatError) as caught:
        read_supernet(supernet)
    assert caught.value.path == where
    assert str(caught.value).startswith("supernet.json: ")


def forge_tensors(
    supernet: Path, name: str, change: Callable[[dict[str, Any]], None]
) -> None:
    """Change a file's tensors, and make the description say that they are right."""
    arrays = load((supernet / name).read_bytes())
    change(arrays)
    replace_file(
        supernet, name, save({n: np.asarray(a, order="C") for n, a in arrays.items()})
    )


def replace_file(supernet: Path, name: str, content: bytes) -> None:
    (supernet / name).write_bytes(content)
    path = supernet / DESCRIPTION_FILE
    description = json.loads(path.read_text())
    description["files"][name] = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(description))


@pytest.mark.parametrize("content", NO_TENSORS.values(), ids=NO_TENSORS)
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_a_supernet_that_holds_no_tensors_is_refused_by_name(
    name: str, content: bytes, supernet: Path
) -> None:
    replace_file(supernet, name, content)
    with pytest.raises(FormatError, match=rf"^supernet\.json: {name} (is not|has) "):
        read_supernet(supernet)


# Of every kind that there is.
TENSORS = [
    name
    for name in sorted(tiny.stored().weights)
    if name.startswith(("stage2.block1", "head"))
]


@pytest.mark.parametrize("tensor", TENSORS)
def test_a_missing_weight_is_refused_by_name(tensor: str, supernet: Path) -> None:
    forge_tensors(supernet, WEIGHTS_FILE, lambda arrays: arrays.pop(tensor))
    with pytest.raises(FormatError, match=rf"weights: {tensor} should have shape"):
        read_supernet(supernet)


@pytest.mark.parametrize("tensor", TENSORS)
def test_a_weight_of_another_shape_is_refused_by_name(
    tensor: str, supernet: Path
) -> None:
    def shorten(arrays: dict[str, Any]) -> None:
        arrays[tensor] = arrays[tensor][:-1]

    forge_tensors(supernet, WEIGHTS_FILE, shorten)
    with pytest.raises(FormatError, match=rf"weights: {tensor} should have shape"):
        read_supernet(supernet)


def test_a_weight_that_no_layer_has_is_refused(supernet: Path) -> None:
    extra = {"stage9.block1.expand.weight": np.zeros(1, dtype=np.float16)}
    forge_tensors(supernet, WEIGHTS_FILE, lambda arrays: arrays.update(extra))
    with pytest.raises(FormatError) as caught:
        read_supernet(supernet)
    assert str(caught.value) == (
        "supernet.json: weights: stage9.block1.expand.weight is no tensor of space tiny"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_no_number_is_refused(value: float, supernet: Path) -> None:
    def poison(arrays: dict[str, Any]) -> None:
        arrays["head.classifier.bias"][0] = value

    forge_tensors(supernet, WEIGHTS_FILE, poison)
    with pytest.raises(FormatError) as caught:
        read_supernet(supernet)
    assert str(caught.value) == (
        "supernet.json: weights: head.classifier.bias holds NaN or infinity; train "
        "the supernet at a lower rate"
    )


@pytest.mark.parametrize("element", [np.int64, np.bool_, np.complex64])
def test_a_weight_that_is_no_float_is_refused_by_name(
    element: type[np.generic], supernet: Path
) -> None:
    def convert(arrays: dict[str, Any]) -> None:
        arrays["head.classifier.bias"] = arrays["head.classifier.bias"].astype(element)

    forge_tensors(supernet, WEIGHTS_FILE, convert)
    with pytest.raises(FormatError) as caught:
        read_supernet(supernet)
    assert str(caught.value) == (
        f"supernet.json: weights: head.classifier.bias holds {np.dtype(element)}; "
        "floating-point numbers belong there"
    )


@pytest.mark.parametrize(
    ("name", "tensor", "value"),
    [
        (CALIBRATION_FILE, "images", None),
        (CALIBRATION_FILE, "images", np.zeros((2, 12, 12, 3), dtype=np.float32)),
        (CALIBRATION_FILE, "images", np.zeros((2, 12, 12), dtype=np.uint8)),
        (CALIBRATION_FILE, "images", np.zeros((2, 12, 12, 4), dtype=np.uint8)),
        (ACCURACY_FILE, "base_accuracy", None),
        (ACCURACY_FILE, "base_accuracy", np.ones(1, dtype=np.complex64)),
        (ACCURACY_FILE, "residual_std", np.zeros(0, dtype=np.float32)),
        (ACCURACY_FILE, "member0.tensor0", np.zeros((3, 400), dtype=np.float32)),
        (ACCURACY_FILE, "member0.tensor2", np.zeros((3, 400), dtype=np.float32)),
        (ACCURACY_FILE, "member0.tensor6", None),
        (ACCURACY_FILE, "residual_std", np.array([np.nan], dtype=np.float32)),
        (SAMPLES_FILE, "genomes", None),
        (SAMPLES_FILE, "genomes", np.zeros((2, 3), dtype=np.int64)),
        (SAMPLES_FILE, "accuracy", np.zeros(1, dtype=np.float64)),
        (SAMPLES_FILE, "accuracy", np.zeros((), dtype=np.float64)),
        (SAMPLES_FILE, "image_count", np.zeros(0, dtype=np.int64)),
        (SAMPLES_FILE, "image_count", np.array([np.nan])),
    ],
)
def test_forged_extras_of_a_supernet_are_refused(
    name: str, tensor: str, value: Any, supernet: Path
) -> None:
    def change(arrays: dict[str, Any]) -> None:
        if value is None:
            del arrays[tensor]
        else:
            arrays[tensor] = value

    forge_tensors(supernet, name, change)
    with pytest.raises(FormatError) as caught:
        read_supernet(supernet)
    assert caught.value.path == name.split(".")[0]
