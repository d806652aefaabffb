"""The older layouts, written here from their description, and read by `load_legacy`."""

import enum
import json
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import modules.quantize
import modules.rqvae
from data.schemas import Catalogue, InputError
from modules.quantize import QuantizeMode
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


def test_hostile_checkpoint_is_refused_and_does_not_run(tmp_path):
    content = {"iter": 1, "model": older_state(CONFIG), "model_config": {**CONFIG, "note": Hostile(tmp_path / "ran")}}
    torch.save(content, tmp_path / "checkpoint.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(content))
    for name in ("checkpoint.pt", "plain.pt"):
        with pytest.raises(InputError, match="code, which is never run"):
            load_legacy(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # the file was dangerous indeed


def test_damaged_checkpoint(tmp_path):
    torch.save({"iter": 1, "model": older_state(CONFIG), "model_config": CONFIG}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"cut\.pt"):
            load_legacy(tmp_path / "cut.pt")
    with pytest.raises(InputError, match="does not exist"):
        load_legacy(tmp_path / "absent.pt")


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
        ({"embed_dim": -1}, "embed_dim"),
    ],
)
def test_configuration_that_does_not_fit(tmp_path, changes, message):
    folder = write_folder(tmp_path / "older", {**CONFIG, **changes}, older_state(CONFIG))
    with pytest.raises(InputError, match=message):
        load_legacy(folder)


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
