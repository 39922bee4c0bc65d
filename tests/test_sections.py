"""Training checkpoints of PyTorch that hold a network and its moving average: which of them is taken."""

import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from rear_jax import artifacts, generators, jobs
from rear_jax.errors import RearError
from rear_jax.weights import layout, sections
from rear_jax.weights.torch_files import read_tensors
from tests import toy
from tests.test_torch_files import Torch

WRAPPED = {  # where training scripts put them -> (what is taken without a choice, names of all)
    "llamagen": ("model", ("model", "ema")),
    "deepspeed": ("module", ("module", "ema")),
    "lightning": ("state_dict.model", ("state_dict.model", "state_dict.ema")),
    "other": ("model", ("model", "net_ema")),
}


def one(value: float) -> Torch.Call:
    """A tensor of [2] whose storage is named by its value."""
    rebuild = Torch.Global("torch._utils", "_rebuild_tensor_v2")
    storage = Torch.Storage(str(value), 2)
    return Torch.Call(rebuild, storage, 0, (2,), (1,), False, {})


def save(path, value, numbers):
    """A zip file as PyTorch writes it; `numbers` are those of its storages."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", Torch.dumps(value))
        for number in numbers:
            archive.writestr(f"archive/data/{number}", np.full(2, number, np.float32).tobytes())
    return path


def training_file(path, names):
    """State dicts under these dotted names; the tensor `w` of each is full of its place in the list."""
    value: dict = {"steps": 7, "optimizer": {"state": {0: {"exp_avg": one(9.0)}}}}
    for place, name in enumerate(names):
        outer, _, inner = name.partition(".")
        entry = {"w": one(float(place))}
        value.setdefault(outer, {}).update({inner: entry} if inner else entry)
    return save(path, value, [*(float(place) for place in range(len(names))), 9.0])


@pytest.mark.parametrize("kind", WRAPPED)
def test_the_usual_state_dict_is_taken_and_any_other_by_name(tmp_path, caplog, kind):
    usual, names = WRAPPED[kind]
    path = training_file(tmp_path / "a.pt", names)
    assert read_tensors(path)["w"].tolist() == [float(names.index(usual))] * 2
    assert (f"taking {usual}. See init_section" in caplog.text) == (kind in ("llamagen", "deepspeed"))
    for place, name in enumerate(names):
        assert read_tensors(path, name)["w"].tolist() == [float(place)] * 2


def test_the_order_in_the_file_does_not_matter(tmp_path):
    path = training_file(tmp_path / "a.pt", ("ema", "model"))
    assert read_tensors(path)["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("names", "there"), [(("model", "ema"), "model, ema"), (("state_dict.model", "ema"), "state_dict.model, ema")]
)
def test_a_name_that_is_not_there_is_one_line_with_those_that_are(tmp_path, names, there):
    path = training_file(tmp_path / "a.pt", names)
    with pytest.raises(RearError, match=rf"a\.pt has no section 'emma'; it has {there}: name one of these, or leave"):
        read_tensors(path, "emma")


def test_a_file_of_one_state_dict_has_no_sections(tmp_path):
    path = save(tmp_path / "a.pt", {"w": one(1.0)}, [1.0])
    assert read_tensors(path)["w"].tolist() == [1.0, 1.0]
    with pytest.raises(RearError, match=r"no section 'ema'; it has one network without a name, or leave init_section"):
        read_tensors(path, "ema")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_section_may_be_what_keys_begin_with(tmp_path, suffix):
    tensors = {"model.w": 1.0, "ema.w": 2.0, "ema.v": 3.0, "step": 4.0}
    path = tmp_path / f"a{suffix}"
    if suffix == ".pt":
        save(path, {"state_dict": {key: one(number) for key, number in tensors.items()}}, tensors.values())
    else:
        save_file({key: np.full(2, number, np.float32) for key, number in tensors.items()}, path)
    found = read_tensors(path, "ema")
    assert {key: value[0] for key, value in found.items()} == {"w": 2.0, "v": 3.0}
    assert {key: value.shape for key, value in layout.outline(found).items()} == {"w": (2,), "v": (2,)}
    with pytest.raises(RearError, match=r"no section 'emma'; it has (state_dict, )?model, ema: name"):
        read_tensors(path, "emma")


def test_a_file_that_refers_to_one_dict_without_end_takes_little_time():
    many = dict.fromkeys(map(str, range(3000)), 1)
    many |= dict.fromkeys(sections.NAMES, many)
    value = dict.fromkeys(map(str, range(3000)), many)
    looked_at = []
    with pytest.raises(RearError, match="holds no state dict"):
        sections.state_dict(value, lambda item: looked_at.append(item) or False, "", "a.pt")
    assert len(looked_at) < 10_000


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Tensors of two toy generators under the authors' keys, and a training checkpoint with both."""
    config = toy.config()
    family = generators.family_of(toy.generator(config))
    shapes = layout.torch_shapes(family.shapes(toy.generator(config)), family.layout.torch_name)
    made = [{key: np.full(value.shape, n, np.float32) for key, value in shapes.items()} for n in (1, 2)]
    folder = tmp_path_factory.mktemp("sections")
    named = zip(("model", "ema"), made, strict=True)
    both = {f"{name}.{key}": value for name, tensors in named for key, value in tensors.items()}
    save_file(both, folder / "both.safetensors")
    for name, tensors in zip(("unwrapped_model", "ema_model"), made, strict=True):
        (folder / "checkpoint-7" / name).mkdir(parents=True)
        save_file(tensors, folder / "checkpoint-7" / name / "model.safetensors")
    save_file(made[0], folder / "checkpoint-7" / "model.safetensors")  # the state of another library
    return folder


def loaded(place, **changes) -> float:
    """The number that all parameters are."""
    config = toy.config(**changes)
    network = toy.generator(config)
    artifacts.check_generator(place, config, place, network, ())
    params = artifacts.read_generator(place, config, network, None)
    (number,) = {float(value) for leaf in jax.tree.leaves(params) for value in np.unique(leaf)}
    return number


def test_the_setting_chooses(two):
    assert loaded(two / "both.safetensors") == 1
    assert loaded(two / "both.safetensors", init_section="ema") == 2
    assert loaded(two / "both.safetensors", tokenizer_section="ema") == 1  # is that of another network
    with pytest.raises(RearError, match=r"both\.safetensors has no section 'emma'; it has model, ema: name one"):
        loaded(two / "both.safetensors", init_section="emma")


def test_a_folder_of_1d_tokenizer_holds_both(two, caplog):
    folder = two / "checkpoint-7"
    assert loaded(folder) == 2  # its authors sample from this one
    assert "holds ema_model, unwrapped_model: taking ema_model. See init_section" in caplog.text
    assert loaded(folder, init_section="unwrapped_model") == 1
    with pytest.raises(RearError, match=r"checkpoint-7 has no section 'ema'; it has ema_model, unwrapped_model: name"):
        loaded(folder, init_section="ema")


def test_convert_takes_the_section(two, tmp_path):
    toy.run(tmp_path, "convert", convert__source=str(two / "both.safetensors"), init_section="ema")
    assert loaded(tmp_path / "converted") == 2
    with pytest.raises(RearError, match=r"^config\.init_section is for training checkpoints .*converted is"):
        loaded(tmp_path / "converted", init_from=str(tmp_path / "converted"), init_section="ema")


def test_a_moving_average_is_never_left_out_in_silence(two, trained, tmp_path):
    """`init_from` with `use_ema`: a published file needs a name, a folder must have one."""
    given = {"tokenizer_from": str(trained / "tokenizer"), "sample__use_ema": True}
    for place, told in (
        (two / "both.safetensors", r"^config\.sample\.use_ema is for .*both\.safetensors set config\.init_section"),
        (trained / "generator", r"^config\.sample\.use_ema: .*generator holds no moving average"),
    ):
        with pytest.raises(RearError, match=told):
            jobs.check_all(("sample",), toy.config(init_from=str(place), **given), tmp_path)
    named = toy.config(init_from=str(two / "both.safetensors"), init_section="ema", **given)
    jobs.check_all(("sample",), named, tmp_path)
