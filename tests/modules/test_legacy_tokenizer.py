"""The older layouts, written here from their description, and read by `load_legacy`."""

import contextlib
import enum
import json
import os
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import modules.quantize
import modules.rqvae
from data.schemas import Catalogue, InputError
from modules.estimators import QuantizeMode
from modules.tokenizer.legacy import is_legacy, load_legacy
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from tests.modules.hub_server import serve_hub
from tests.modules.test_tokenizer import run_with_hub

CONFIG = {
    "input_dim": 10,
    "embed_dim": 4,
    "hidden_dims": [9, 8, 7],
    "codebook_size": 6,
    "codebook_kmeans_init": True,
    "codebook_normalize": False,
    "codebook_sim_vq": False,
    "n_layers": 3,
    "commitment_weight": 0.25,
    "n_cat_features": 0,
}

PLAIN, NORMALISED, SIM_VQ = {}, {"codebook_normalize": True}, {"codebook_sim_vq": True, "codebook_normalize": True}


def older_state(config):
    generator = torch.Generator().manual_seed(0)
    widths = [config["input_dim"], *config["hidden_dims"], config["embed_dim"]]
    state = {}
    for name, dims in (("encoder", widths), ("decoder", widths[::-1])):
        for layer in range(4):
            state[f"{name}.mlp.{2 * layer}.weight"] = torch.randn(dims[layer + 1], dims[layer], generator=generator)
    for level in range(config["n_layers"]):
        shape = (config["codebook_size"], config["embed_dim"])
        state[f"layers.{level}.embedding.weight"] = torch.randn(shape, generator=generator)
        if config["codebook_sim_vq"]:
            state[f"layers.{level}.out_proj.0.weight"] = torch.randn(4, 4, generator=generator)
    return state


def older_outputs(config, state, x):
    """Codes and reconstruction as the older implementation computes them in evaluation."""

    def mlp(name, x):
        for layer in range(4):
            x = x @ state[f"{name}.mlp.{2 * layer}.weight"].T
            x = F.silu(x) if layer < 3 else x
        return x

    latent = mlp("encoder", x)
    residual = F.normalize(latent, dim=-1) if config["codebook_normalize"] else latent
    codes, total = [], 0
    for level in range(config["n_layers"]):
        codebook = state[f"layers.{level}.embedding.weight"]
        if config["codebook_sim_vq"]:
            codebook = codebook @ state[f"layers.{level}.out_proj.0.weight"].T
        if config["codebook_normalize"] and level == 0:
            codebook = F.normalize(codebook, dim=-1)
        codes.append(torch.cdist(residual, codebook).argmin(dim=1))
        residual = residual - codebook[codes[-1]]
        total = total + codebook[codes[-1]]
    return torch.stack(codes, dim=1), F.normalize(mlp("decoder", total), dim=-1)


def write_folder(folder, config, state):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    return folder


def check(rqvae, config, state):
    x = torch.randn(50, config["input_dim"], generator=torch.Generator().manual_seed(1))
    codes, reconstruction = older_outputs(config, state, x)
    assert torch.equal(rqvae.semantic_ids(x), codes)
    total = sum(book[codes[:, level]] for level, book in enumerate(rqvae.codebooks()))
    torch.testing.assert_close(rqvae.decode(total), reconstruction)
    assert rqvae.codebooks_initialized
    assert not rqvae.training


@pytest.mark.parametrize("changes", [PLAIN, NORMALISED, SIM_VQ], ids=["plain", "normalised", "sim_vq"])
def test_folder(tmp_path, changes):
    config = {**CONFIG, **changes}
    state = older_state(config)
    folder = write_folder(tmp_path / "older", config, state)
    assert is_legacy(folder)
    check(load_legacy(folder), config, state)


@pytest.mark.slow
def test_hub_repository(tmp_path):
    write_folder(tmp_path / "hub" / "edobotta" / "rqvae-amazon-beauty", CONFIG, older_state(CONFIG))
    script = """
import torch
from modules.tokenizer.legacy import is_legacy, load_legacy
assert is_legacy("edobotta/rqvae-amazon-beauty")
x = torch.randn(50, 10, generator=torch.Generator().manual_seed(1))
print(load_legacy("edobotta/rqvae-amazon-beauty").semantic_ids(x).tolist())
"""
    with serve_hub(tmp_path / "hub") as (endpoint, _):
        lines = run_with_hub(script, endpoint, tmp_path / "cache")
    x = torch.randn(50, 10, generator=torch.Generator().manual_seed(1))
    assert json.loads(lines[-1]) == older_outputs(CONFIG, older_state(CONFIG), x)[0].tolist()


def test_categorical_features_keep_their_codes(tmp_path):
    config = {**CONFIG, "n_cat_features": 3}
    rqvae = load_legacy(write_folder(tmp_path / "older", config, older_state(config)))
    x = torch.randn(50, 10, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rqvae.semantic_ids(x), older_outputs(config, older_state(config), x)[0])
    assert rqvae.config.num_categorical == 3


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
def test_checkpoint(tmp_path, prefix):
    state = older_state(CONFIG)
    content = {
        "iter": 999,
        "model": {prefix + name: tensor for name, tensor in state.items()},
        "model_config": CONFIG,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]},
    }
    torch.save(content, tmp_path / "checkpoint_999.pt")
    assert is_legacy(tmp_path / "checkpoint_999.pt")
    check(load_legacy(tmp_path / "checkpoint_999.pt"), CONFIG, state)


def test_checkpoint_whose_configuration_holds_the_model_itself(tmp_path, monkeypatch):
    """The older constructor recorded its local variables: the mode, the class and the half-built model."""

    class QuantizeForwardMode(enum.Enum):
        STE = 2

    class RqVae(torch.nn.Module):
        pass

    for name, cls, home in (
        ("QuantizeForwardMode", QuantizeForwardMode, modules.quantize),
        ("RqVae", RqVae, modules.rqvae),
    ):
        cls.__module__, cls.__qualname__ = home.__name__, name
        monkeypatch.setattr(home, name, cls, raising=False)
    model = RqVae()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    config = {**CONFIG, "codebook_mode": QuantizeForwardMode.STE, "self": model, "__class__": RqVae}
    state = older_state(CONFIG)
    torch.save({"iter": 1, "model": state, "model_config": config}, tmp_path / "checkpoint.pt")
    monkeypatch.undo()

    rqvae = load_legacy(tmp_path / "checkpoint.pt")
    check(rqvae, CONFIG, state)
    assert rqvae.config.mode is QuantizeMode.STRAIGHT_THROUGH


class Hostile:
    """Runs a command when a trusting unpickler reads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def hostile_checkpoint(place, payload):
    state = older_state(CONFIG)
    content = {"iter": 1, "model": state, "model_config": CONFIG}
    match place:
        case "configuration":
            return {**content, "model_config": {**CONFIG, "note": payload}}
        case "weights":
            return {**content, "model": {**state, "layers.0.embedding.weight": payload}}
        case "optimizer":
            return {**content, "optimizer": {"state": {0: [payload]}}}
        case "key":
            return {**content, payload: 1}
        case _:
            return payload


@pytest.mark.parametrize("layout", ["zip", "older", "pickle"])
@pytest.mark.parametrize("place", ["configuration", "weights", "optimizer", "key", "whole"])
def test_hostile_checkpoint_is_refused_and_does_not_run(tmp_path, place, layout):
    content, path = hostile_checkpoint(place, Hostile(tmp_path / "ran")), tmp_path / "checkpoint.pt"
    if layout == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(InputError, match="code, which is never run"):
        load_legacy(path)
    assert not (tmp_path / "ran").exists()
    with contextlib.suppress(Exception):  # a plain pickle runs before torch finds that it is none of its files
        torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # the file was dangerous indeed


def test_the_older_implementation_s_names_reach_nothing_of_ours(tmp_path, monkeypatch):
    """A checkpoint may name modules.rqvae.RqVae, but its arguments and state go to a stand-in."""

    class Names:
        def __reduce__(self):
            return modules.rqvae.RqVae, ("x",), {"run": 1}

    monkeypatch.setattr(modules.rqvae.RqVae, "__init__", lambda *_, **__: pytest.fail("the class was called"))
    content = {"iter": 1, "model": {}, "model_config": {"self": Names()}}
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="configuration lacks"):
        load_legacy(tmp_path / "checkpoint.pt")


def whole_checkpoint(tmp_path, layout="zip"):
    path = tmp_path / "whole.pt"
    content = {"iter": 1, "model": older_state(CONFIG), "model_config": CONFIG}
    torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
    return path.read_bytes()


@pytest.mark.parametrize("layout", ["zip", "older"])
def test_truncated_checkpoint(tmp_path, layout):
    whole, path = whole_checkpoint(tmp_path, layout), tmp_path / "cut.pt"
    for size in (0, 1, 2, 10, *range(100, len(whole) - 1, 211)):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"cut\.pt"):
            load_legacy(path)
    with pytest.raises(InputError, match="does not exist"):
        load_legacy(tmp_path / "absent.pt")


@pytest.mark.parametrize("layout", ["zip", "older"])
def test_damaged_checkpoint(tmp_path, layout):
    """A flipped byte is an error that names the file, or changes a number: never a crash."""
    whole, path, generator = whole_checkpoint(tmp_path, layout), tmp_path / "damaged.pt", random.Random(0)
    messages = []
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole) if generator.random() < 0.5 else 2000)] ^= generator.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            assert load_legacy(path).config.input_dim > 0
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert all("damaged.pt" in message for message in messages)


@pytest.mark.parametrize("content", [{"iter": 1, "model": {}}, [1, 2], {"model": 3, "model_config": {}}])
def test_checkpoint_without_configuration(tmp_path, content):
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="'model' and 'model_config'"):
        load_legacy(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_size": 7}, "do not fit each other"),
        ({"n_layers": 2}, "do not fit each other"),
        ({"hidden_dims": None}, "do not fit each other"),
        ({"hidden_dims": [9, 8]}, "do not fit each other"),
        ({"embed_dim": -1}, "embed_dim"),
        ({"codebook_size": "6"}, "codebook_sizes expected integers"),
        ({"n_layers": 10**9}, "n_layers expected 1 to 8, got 1000000000"),
        ({"n_layers": 0}, "n_layers expected 1 to 8, got 0"),
        ({"n_layers": "3"}, "n_layers expected 1 to 8, got '3'"),
        ({"input_dim": 10**12}, "do not fit each other"),
        ({"codebook_size": 10**12}, "do not fit each other"),
        ({"hidden_dims": [10**9, 10**9, 10**9]}, "do not fit each other"),
        ({"hidden_dims": [10**6] * 5}, "do not fit each other"),
        ({"input_dim": 10**30}, "do not fit each other"),
        ({"n_cat_features": 11}, "num_categorical expected 0 to input_dim=10"),
        ({"commitment_weight": None}, "do not fit each other"),
    ],
)
def test_configuration_that_does_not_fit(tmp_path, changes, message):
    folder = write_folder(tmp_path / "older", {**CONFIG, **changes}, older_state(CONFIG))
    with pytest.raises(InputError, match=message) as caught:
        load_legacy(folder)
    assert str(caught.value).startswith(str(folder))


def test_a_large_configuration_of_small_weights_takes_no_memory(tmp_path, monkeypatch):
    built_on = []

    class Recorded(modules.rqvae.RqVae):
        def __init__(self, config):
            built_on.append(torch.empty(0).device.type)
            super().__init__(config)

    monkeypatch.setattr("modules.tokenizer.legacy.RqVae", Recorded)
    with pytest.raises(InputError, match="do not fit each other"):
        load_legacy(write_folder(tmp_path / "a", {**CONFIG, "codebook_size": 10**7}, older_state(CONFIG)))
    assert built_on == ["meta"]
    load_legacy(write_folder(tmp_path / "b", CONFIG, older_state(CONFIG)))
    assert built_on == ["meta", "meta", "cpu"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers.1.embedding.weight", torch.full((6, 4), torch.nan), r"quantizers\.1\.weight holds NaN or infinity"),
        ("decoder.mlp.0.weight", torch.full((7, 4), torch.inf), "holds NaN or infinity"),
        ("layers.1.embedding.weight", torch.zeros(6, 5), "do not fit each other"),
        ("layers.1.embedding.weight", [[1.0]], "expected weights by name, got list"),
        (3, torch.zeros(1), "expected weights by name, got Tensor for 3"),
        ("encoder.mlp", torch.zeros(1), "do not fit each other"),
        (f"encoder.mlp.{'9' * 5000}.weight", torch.zeros(1), "do not fit each other"),
        ("layers", torch.zeros(1), "do not fit each other"),
        ("", torch.zeros(1), "do not fit each other"),
    ],
)
def test_weights_that_are_none(tmp_path, name, value, message):
    content = {"iter": 1, "model": {**older_state(CONFIG), name: value}, "model_config": CONFIG}
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match=message) as caught:
        load_legacy(tmp_path / "checkpoint.pt")
    assert str(caught.value).startswith(str(tmp_path / "checkpoint.pt"))


def test_missing_keys_are_named(tmp_path):
    config = {key: value for key, value in CONFIG.items() if key != "n_layers"}
    with pytest.raises(InputError, match="lacks \\['n_layers'\\]"):
        load_legacy(write_folder(tmp_path / "older", config, older_state(CONFIG)))


def test_older_layout_becomes_a_tokenizer_given_features(tmp_path):
    folder = write_folder(tmp_path / "older", CONFIG, older_state(CONFIG))
    with pytest.raises(InputError, match="load_legacy"):
        SemanticIdTokenizer.from_pretrained(folder)
    features = torch.randn(20, 10, generator=torch.Generator().manual_seed(2))
    catalogue = Catalogue([str(i) for i in range(20)], [""] * 20, [""] * 20)
    tokenizer = SemanticIdTokenizer.fit(
        load_legacy(folder), features, catalogue, feature_description={}, dataset_manifest_hash=""
    )
    assert torch.equal(tokenizer.semantic_ids[:, :3], older_outputs(CONFIG, older_state(CONFIG), features)[0])
    tokenizer.save_pretrained(tmp_path / "new")
    assert not is_legacy(tmp_path / "new")
    assert SemanticIdTokenizer.from_pretrained(tmp_path / "new").content_hash == tokenizer.content_hash
