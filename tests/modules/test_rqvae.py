import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from data.schemas import InputError
from modules.estimators import QuantizeMode
from modules.loss import quantize_loss, reconstruction_loss
from modules.quantize import Distance, LevelConfig
from modules.rqvae import RqVae, RqVaeConfig


def linear_model(codebooks, mode=QuantizeMode.STRAIGHT_THROUGH, **settings):
    """Encoder and decoder are the identity of the plane; the codebooks are given."""
    sizes = tuple(len(codebook) for codebook in codebooks)
    model = RqVae(RqVaeConfig(input_dim=2, embed_dim=2, hidden_dims=(), codebook_sizes=sizes, mode=mode, **settings))
    with torch.no_grad():
        for mlp in (model.encoder, model.decoder):
            mlp.linears[0].weight.copy_(torch.eye(2))
        for quantizer, codebook in zip(model.quantizers, codebooks, strict=True):
            quantizer.weight.copy_(torch.tensor(codebook))
    return model


# x = (3, 1) takes (2, 0), leaving (1, 1), then (1, 0.5), leaving (0, 0.5): the sum of the codes is (3, 0.5).
CODEBOOKS = [[[2.0, 0.0], [-5.0, 0.0]], [[-1.0, 0.0], [1.0, 0.5]]]
X = torch.tensor([[3.0, 1.0]])


def test_loss_by_hand():
    output = linear_model(CODEBOOKS)(X)
    assert output.codes.tolist() == [[0, 1]]
    assert output.reconstruction_loss.item() == pytest.approx(0.25)
    assert output.quantize_loss.item() == pytest.approx(1.25 * 2.0 + 1.25 * 0.25)
    assert output.loss.item() == pytest.approx(3.0625)


def test_straight_through_gradient_by_hand():
    model = linear_model(CODEBOOKS)
    model(X).loss.backward()
    # Latent: reconstruction 2 (x_hat - x) = (0, -1); commitments 0.5 (1, 1) and 0.5 (0, 0.5). An encoder that does
    # not feel the second level (`res = res - emb` with a straight-through emb) would get (0.5, -0.5).
    torch.testing.assert_close(model.encoder.linears[0].bias.grad, torch.tensor([0.5, -0.25]))
    torch.testing.assert_close(model.encoder.linears[0].weight.grad, torch.tensor([[1.5, 0.5], [-0.75, -0.25]]))
    torch.testing.assert_close(model.decoder.linears[0].bias.grad, torch.tensor([0.0, -1.0]))
    # Codes move to their residuals: 2 (e - r); the unchosen stay.
    torch.testing.assert_close(model.quantizers[0].weight.grad, torch.tensor([[-2.0, -2.0], [0.0, 0.0]]))
    torch.testing.assert_close(model.quantizers[1].weight.grad, torch.tensor([[0.0, 0.0], [0.0, -1.0]]))


def test_every_level_reaches_the_encoder_with_full_weight():
    # Three levels whose residuals all differ; the decoder is cut off, so only commitments remain.
    model = linear_model([[[8.0, 0.0]], [[0.0, 4.0]], [[1.0, 0.0]]])
    with torch.no_grad():
        model.decoder.linears[0].weight.zero_()
    model(torch.tensor([[10.0, 5.0]])).loss.backward()
    # Offsets r - e: (2, 5), (2, 1), (1, 1); times 2 beta = 0.5, summed.
    torch.testing.assert_close(model.encoder.linears[0].bias.grad, torch.tensor([2.5, 3.5]))


def test_rotation_trick_gradient_by_hand():
    # x = (1, 0) becomes (0, 2), a quarter turn scaled by 2: the reconstruction's gradient (-2, 4) turns back to
    # 2 (4, 2); the commitment adds 0.5 (1, -2).
    model = linear_model([[[0.0, 2.0]]], QuantizeMode.ROTATION_TRICK)
    output = model(torch.tensor([[1.0, 0.0]]))
    output.loss.backward()
    assert output.reconstruction_loss.item() == pytest.approx(5.0)
    torch.testing.assert_close(model.encoder.linears[0].bias.grad, torch.tensor([8.5, 3.0]))


def frozen_quantities(model, x, temperature, seed):
    """Everything that the surrogate holds still, at the present parameters."""
    torch.manual_seed(seed)
    residual = model.encode(x).detach()
    frozen = {"residuals": [], "embeddings": [], "codes": [], "noise": [], "units": [], "latent": residual}
    total = torch.zeros_like(residual)
    for quantizer in model.quantizers:
        codebook = quantizer.codebook().detach()
        distance = (residual[:, None] - codebook[None]).square().sum(dim=-1)
        codes, unit = distance.argmin(dim=1), distance.amin(dim=1).mean()
        embedding = codebook[codes]
        if model.config.mode is QuantizeMode.GUMBEL_SOFTMAX:
            noise = -torch.empty_like(distance).exponential_().log()
            embedding = (-distance / (temperature * unit) + noise).softmax(dim=-1) @ codebook
            frozen["noise"].append(noise)
        for name, value in (("residuals", residual), ("embeddings", embedding), ("codes", codes), ("units", unit)):
            frozen[name].append(value)
        total = total + embedding
        residual = residual - embedding
    frozen["total"] = total
    return frozen


def turn(latent, total):
    """The rotation of the plane of two vectors, from the Rodrigues formula, times the ratio of their norms."""
    a, b = latent / latent.norm(), total / total.norm()
    across = b - (a @ b) * a
    c, across = across / across.norm(), a @ b
    angle = torch.acos(across)
    plane = torch.outer(c, a) - torch.outer(a, c)
    rotation = torch.eye(len(a)) + angle.sin() * plane + (1 - angle.cos()) * plane @ plane
    return rotation * total.norm() / latent.norm()


def surrogate(model, x, temperature, frozen):
    """The loss as a plain function: each stop-gradient term and each choice of codes is a constant."""
    config = model.config
    residual = latent = model.encode(x)
    total = torch.zeros_like(latent)
    loss = torch.zeros(len(x))
    for level, quantizer in enumerate(model.quantizers):
        codebook = quantizer.codebook()
        embedding = codebook[frozen["codes"][level]]
        if config.mode is QuantizeMode.GUMBEL_SOFTMAX:
            distance = (residual[:, None] - codebook[None]).square().sum(dim=-1)
            logits = -distance / (temperature * frozen["units"][level]) + frozen["noise"][level]
            embedding = logits.softmax(dim=-1) @ codebook
        loss = loss + (frozen["residuals"][level] - embedding).square().sum(dim=1)
        loss = loss + config.commitment_weight * (residual - frozen["embeddings"][level]).square().sum(dim=1)
        residual = residual - frozen["embeddings"][level]
        total = total + embedding
    if config.mode is QuantizeMode.STRAIGHT_THROUGH:
        total = latent + frozen["total"] - frozen["latent"]
    if config.mode is QuantizeMode.ROTATION_TRICK:
        turns = torch.stack([turn(*pair) for pair in zip(frozen["latent"], frozen["total"], strict=True)])
        total = torch.einsum("bij,bj->bi", turns, latent)
    prediction = model.decode(total)
    split = config.input_dim - config.num_categorical
    loss = loss + (prediction[:, :split] - x[:, :split]).square().sum(dim=1)
    probability = torch.sigmoid(prediction[:, split:])
    loss = loss - torch.where(x[:, split:] > 0.5, probability, 1 - probability).log().sum(dim=1)
    return loss.mean()


@pytest.mark.parametrize("mode", QuantizeMode)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sim_vq": True, "activation": "silu", "bias": False},
        {"codebook_normalize": True, "normalize_output": True, "num_categorical": 2},
    ],
    ids=["plain", "sim_vq", "normalised, categorical"],
)
def test_gradients_equal_finite_differences_of_the_frozen_surrogate(mode, settings):
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        model = RqVae(
            RqVaeConfig(input_dim=6, embed_dim=4, hidden_dims=(5,), codebook_sizes=(7, 6, 5), mode=mode, **settings)
        )
        x = torch.cat([torch.randn(9, 4), torch.randint(2, (9, 2)).double()], dim=1)
        frozen = frozen_quantities(model, x, 0.7, seed=1)
        torch.manual_seed(1)
        output = model(x, 0.7)
        output.loss.backward()
        torch.testing.assert_close(output.loss, surrogate(model, x, 0.7, frozen))

        step = 1e-5
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.add_(sign * step * direction)
                    values.append(surrogate(model, x, 0.7, frozen))
                    parameter.sub_(sign * step * direction)
            numeric = (values[0] - values[1]) / (2 * step)
            analytic = (parameter.grad * direction).sum()
            torch.testing.assert_close(analytic, numeric, rtol=1e-5, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")
    finally:
        torch.set_default_dtype(torch.float32)


def test_fitting_the_autoencoder_leaves_the_codebooks_alone_and_is_deterministic():
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(RqVae(RqVaeConfig(input_dim=6, embed_dim=3, hidden_dims=(8,), codebook_sizes=(5, 5))))
    model, again = models
    before = [codebook.detach().clone() for codebook in model.codebooks()]
    error = reconstruction_loss(model.decode(model.encode(x)), x).mean()
    model.fit_autoencoder_(x, num_steps=100, learning_rate=1e-2)
    assert reconstruction_loss(model.decode(model.encode(x)), x).mean() < 0.5 * error
    assert all(torch.equal(*pair) for pair in zip(before, model.codebooks(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    again.fit_autoencoder_(x, num_steps=100, learning_rate=1e-2)
    assert torch.equal(model.encode(x), again.encode(x))


def test_zero_categorical_features_leave_all_columns_continuous():
    prediction, x = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    assert reconstruction_loss(prediction, x).tolist() == [1.0 + 4.0 + 4.0]
    torch.manual_seed(0)
    model = RqVae(RqVaeConfig(input_dim=3, hidden_dims=(16,), normalize_output=True))
    norms = model.decode(torch.randn(5, 32)).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(5))


def test_categorical_columns_use_cross_entropy_and_are_not_normalised():
    prediction, x = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 0.0]])
    expected = 0.25 + 0.6931472 + 2.1269280  # squared error, -log sigmoid(0), -log sigmoid(-2)
    assert reconstruction_loss(prediction, x, num_categorical=2).item() == pytest.approx(expected)
    torch.manual_seed(0)
    model = RqVae(RqVaeConfig(input_dim=3, hidden_dims=(16,), normalize_output=True, num_categorical=1))
    embedding = torch.randn(5, 32)
    torch.testing.assert_close(model.decode(embedding)[:, :2].norm(dim=1), torch.ones(5))
    assert torch.equal(model.decode(embedding)[:, 2], model.decoder(embedding)[:, 2])


def test_quantize_loss_by_hand():
    loss = quantize_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]]), 0.5)
    assert loss.tolist() == [7.5]


def test_initialization_makes_residual_codebooks_and_is_recorded():
    model = linear_model([[[9.0, 9.0]] * 2, [[9.0, 9.0]] * 2])
    assert not model.codebooks_initialized
    model.initialize_codebooks_(torch.tensor([[0.0, -1.0], [0.0, 1.0], [8.0, -1.0], [8.0, 1.0]]))
    first, second = (quantizer.codebook() for quantizer in model.quantizers)
    assert sorted(first.tolist()) == [[0.0, 0.0], [8.0, 0.0]]
    assert sorted(second.tolist()) == [[0.0, -1.0], [0.0, 1.0]]
    assert model.codebooks_initialized


def test_a_reloaded_model_is_not_initialised_again():
    config = RqVaeConfig(input_dim=6, embed_dim=3, hidden_dims=(4,), codebook_sizes=(5, 5))
    model, reloaded = RqVae(config), RqVae(config)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    model.initialize_codebooks_(x)
    reloaded.load_state_dict(model.state_dict())
    assert reloaded.codebooks_initialized
    reloaded.train()(x)
    for before, after in zip(model.codebooks(), reloaded.codebooks(), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("mode", QuantizeMode)
def test_training_lowers_the_loss(mode):
    torch.manual_seed(0)
    x = torch.randn(8, 12).repeat(16, 1) + 0.1 * torch.randn(128, 12)
    model = RqVae(RqVaeConfig(input_dim=12, embed_dim=4, hidden_dims=(16,), codebook_sizes=(8, 8), mode=mode))
    model.initialize_codebooks_(x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = model.eval()(x).loss.item()
    model.train()
    for step in range(200):
        optimizer.zero_grad()
        model(x, 0.5 * 0.98**step).loss.backward()
        optimizer.step()
    assert model.eval()(x).loss.item() < 0.5 * first


def test_semantic_ids_are_the_codes_of_evaluation():
    torch.manual_seed(0)
    model = RqVae(RqVaeConfig(input_dim=6, codebook_sizes=(8, 4))).eval()
    x = torch.randn(63, 6)
    codes = model.semantic_ids(x)
    assert codes.shape == (63, 2)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, model(x).codes)
    assert not codes.requires_grad


def test_normalised_latents_lie_on_the_unit_sphere():
    torch.manual_seed(0)
    model = RqVae(RqVaeConfig(input_dim=6, codebook_sizes=(8, 4), codebook_normalize=True))
    torch.testing.assert_close(model.encode(torch.randn(7, 6)).norm(dim=1), torch.ones(7))
    first, second = model.codebooks()
    torch.testing.assert_close(first.norm(dim=1), torch.ones(8))
    assert (second.norm(dim=1) - 1).abs().max() > 0.01


def test_losses_and_distances_stay_in_fp32_under_autocast():
    torch.manual_seed(0)
    model = RqVae(RqVaeConfig(input_dim=6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(torch.randn(5, 6))
    assert output.loss.dtype == output.reconstruction_loss.dtype == output.quantize_loss.dtype == torch.float32
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_half_precision_losses_are_summed_in_fp32():
    x = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    assert reconstruction_loss(torch.zeros_like(x), x).item() == 4096.0


@pytest.mark.parametrize("shape", [(640, 512), (768,)])
def test_wrong_input_width_says_what_to_change(shape):
    model = RqVae(RqVaeConfig(input_dim=768))
    with pytest.raises(InputError) as error:
        model.encode(torch.zeros(shape))
    assert "expected x of shape [B, 768] (input_dim=768)" in str(error.value)
    assert f"got {list(shape)}" in str(error.value)
    assert f"Set RqVaeConfig.input_dim = {shape[-1]}" in str(error.value)


def test_configuration_survives_json_with_its_mode():
    config = RqVaeConfig(input_dim=9, mode=QuantizeMode.GUMBEL_SOFTMAX, codebook_sizes=[4, 5], sim_vq=True)
    assert RqVaeConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["mode"] == "gumbel_softmax"
    assert config.codebook_sizes == (4, 5)
    later = {"distance", "sinkhorn_epsilon", "ema_decay", "restart_after", "encoder"}
    later |= {"separation_weight", "separation_margin"}
    assert {field.name for field in dataclasses.fields(RqVaeConfig)} - later == set(config.to_dict())


def test_configuration_of_every_level_survives_json():
    config = RqVaeConfig(
        input_dim=9,
        codebook_sizes=(4, 5),
        mode=(QuantizeMode.ROTATION_TRICK, QuantizeMode.STRAIGHT_THROUGH),
        distance=(Distance.L2, Distance.COSINE),
        sinkhorn_epsilon=(0.0, 0.003),
        ema_decay=(0.99, 0.0),
        restart_after=7,
    )
    assert RqVaeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.levels == (
        LevelConfig(size=4, mode=QuantizeMode.ROTATION_TRICK, ema_decay=0.99, restart_after=7),
        LevelConfig(
            size=5,
            mode=QuantizeMode.STRAIGHT_THROUGH,
            distance=Distance.COSINE,
            sinkhorn_epsilon=0.003,
            restart_after=7,
        ),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook_sizes": ()}, "one to 8 levels"),
        ({"codebook_sizes": (256, 0)}, "integers of at least 1"),
        ({"embed_dim": 2.5}, "integers of at least 1"),
        ({"num_categorical": 10}, "num_categorical expected 0 to input_dim=9"),
        ({"commitment_weight": -1.0}, "commitment_weight"),
        ({"activation": "gelu"}, "relu, silu"),
        ({"mode": "rotation"}, "ROTATION_TRICK"),
        ({"mode": (QuantizeMode.ROTATION_TRICK,)}, "mode expected one value, or one for each of the 3 levels"),
        ({"codebook_sizes": (4,) * 9}, "one to 8 levels"),
        ({"codebook_sizes": (4, 4, 0)}, "integers of at least 1"),
        ({"sinkhorn_epsilon": (0.0, -0.1, 0.0)}, "level 1: sinkhorn_epsilon expected 0 .* or at least 1e-06"),
        ({"sinkhorn_epsilon": 1e-40}, "level 0: sinkhorn_epsilon"),
        ({"sinkhorn_epsilon": float("nan")}, "level 0: sinkhorn_epsilon"),
        ({"ema_decay": 1.0}, "level 0: ema_decay"),
        ({"restart_after": -1}, "level 0: restart_after"),
        ({"distance": "l2"}, "level 0: distance expected one of L2, COSINE"),
        ({"mode": QuantizeMode.GUMBEL_SOFTMAX, "sinkhorn_epsilon": 0.1}, "GUMBEL_SOFTMAX chooses softly"),
        ({"sim_vq": True, "ema_decay": 0.9}, "sim_vq freezes the codes"),
        ({"encoder": "skip", "embed_dim": 32}, 'encoder = "skip" expected embed_dim of at most input_dim'),
        ({"encoder": "identity", "distance": Distance.COSINE}, "from k-means: expected distance = Distance.L2"),
        ({"separation_weight": -1.0}, "separation_weight expected at least 0"),
        ({"encoder": "linear"}, "encoder expected one of mlp, skip, identity"),
    ],
)
def test_configuration_refuses(change, message):
    with pytest.raises(InputError, match=message):
        RqVaeConfig(input_dim=9, **change)


def test_a_refusal_names_what_was_got_and_nothing_else():
    with pytest.raises(InputError) as caught:
        RqVaeConfig(input_dim=9, sinkhorn_epsilon=(0.0, -0.1, 0.0))
    assert str(caught.value) == (
        "RqVaeConfig: level 1: sinkhorn_epsilon expected 0 (the nearest code) or at least 1e-06, "
        "got sinkhorn_epsilon = (0.0, -0.1, 0.0)."
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_dim": 9, "mode": "straight_through", "depth": 3}, "depth"),
        ({"input_dim": 9}, "mode"),
        ({"mode": "straight_through"}, "input_dim"),
        ({"input_dim": 9, "mode": "nearest"}, "nearest"),
    ],
)
def test_stored_configuration_is_checked(fields, message):
    with pytest.raises(InputError, match=message):
        RqVaeConfig.from_dict(fields)


def test_dead_relu_latents_do_not_make_nan():
    model = RqVae(RqVaeConfig(input_dim=4, embed_dim=2, hidden_dims=(3,), codebook_sizes=(2,), codebook_normalize=True))
    with torch.no_grad():
        for linear in model.encoder.linears:
            linear.weight.zero_()
    output = model(F.normalize(torch.ones(3, 4), dim=-1))
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_levels_of_several_modes_pass_the_gradient_on_from_run_to_run():
    """A run behind others turns what they have left over; straight-through passes all that it finds."""
    x = torch.tensor([[3.0, 1.0]], dtype=torch.float64)

    def gradient(*modes):
        model = linear_model(CODEBOOKS, mode=modes).double().train()
        latent = x.clone().requires_grad_()
        passed, _, codes = model._quantize(latent, 1.0)
        assert codes.tolist() == [[0, 1]]
        assert passed.tolist() == [[3.0, 0.5]]
        return torch.autograd.grad(passed.sum(), latent)[0]

    straight, rotation = QuantizeMode.STRAIGHT_THROUGH, QuantizeMode.ROTATION_TRICK
    torch.testing.assert_close(gradient(straight, rotation), torch.ones(1, 2, dtype=torch.float64))
    # (3, 1) onto (2, 0): R = 2 / sqrt(10) times a turn by -atan(1 / 3); straight-through passes what is left, 1 - R.
    torch.testing.assert_close(gradient(rotation, straight), torch.ones(1, 2, dtype=torch.float64))
    # In the plane, where turns commute, a run of two is what the two would pass on one by one.
    first = torch.tensor([[0.6, 0.2], [-0.2, 0.6]], dtype=torch.float64)
    second = torch.tensor([[0.75, 0.25], [-0.25, 0.75]], dtype=torch.float64)
    chained = first + second @ (torch.eye(2, dtype=torch.float64) - first)
    torch.testing.assert_close(gradient(rotation, rotation), torch.ones(1, 2, dtype=torch.float64) @ chained)


def test_levels_one_by_one_give_what_the_fused_path_gives():
    torch.manual_seed(0)
    fused = RqVae(RqVaeConfig(input_dim=6, embed_dim=4, hidden_dims=(8,), codebook_sizes=(5, 3)))
    by_level = RqVae(dataclasses.replace(fused.config, restart_after=1000))
    by_level.load_state_dict(fused.state_dict(), strict=False)
    x = torch.randn(20, 6)
    outputs = [model.train()(x) for model in (fused, by_level)]
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other)
    for output in outputs:
        output.loss.backward()
    for (name, one), other in zip(fused.named_parameters(), by_level.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_identity_quantizes_the_features_themselves():
    model = RqVae(RqVaeConfig(input_dim=2, codebook_sizes=(2, 2), encoder="identity"))
    assert model.config.embed_dim == 2
    assert model.config.hidden_dims == ()
    model.set_codebooks_([torch.tensor(codebook) for codebook in CODEBOOKS])
    assert model.semantic_ids(X).tolist() == [[0, 1]]
    assert model.reconstruct(X).tolist() == [[3.0, 0.5]]
    assert bool(model.codebooks_initialized)


def test_cosine_levels_choose_by_direction_and_add_the_code_itself():
    codebooks = [[[4.0, 0.0], [10.0, 1.0]], [[0.0, 0.0], [1.0, 1.0]]]
    model = linear_model(codebooks, distance=(Distance.COSINE, Distance.L2))
    # (3, 0.29) lies nearer to (4, 0), but its direction is that of (10, 1); what is left is (-7, -0.71).
    codes, left = model.quantize(torch.tensor([[3.0, 0.29]]))
    assert codes.tolist() == [[1, 0]]
    torch.testing.assert_close(left, torch.tensor([[-7.0, -0.71]]))
    torch.testing.assert_close(model.embed(codes), torch.tensor([[10.0, 1.0]]))
    costs = model.level_costs(torch.tensor([[3.0, 0.29]]), 0)
    torch.testing.assert_close(costs, torch.tensor([[-0.995360, -0.999995]]))
    torch.testing.assert_close(model.level_costs(torch.tensor([[1.0, 0.0]]), 1), torch.tensor([[1.0, 1.0]]))


def test_skip_begins_as_principal_components_and_learns():
    torch.manual_seed(0)
    model = RqVae(RqVaeConfig(input_dim=6, embed_dim=2, hidden_dims=(5,), codebook_sizes=(4, 4), encoder="skip"))
    x = torch.randn(200, 6) * torch.tensor([9.0, 1.0, 0.1, 5.0, 0.2, 0.1]) + 3.0
    model.set_principal_components_(x)
    latent = model.encode(x)
    torch.testing.assert_close(latent.mean(dim=0), torch.zeros(2), atol=1e-4, rtol=0.0)
    assert latent.var(dim=0).tolist() == pytest.approx([81.0, 25.0], rel=0.3)
    error = (model.decode(latent) - x).square().sum(dim=1).mean()
    rest = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))[:-2].sum()
    torch.testing.assert_close(error, rest, rtol=1e-3, atol=1e-4)
    model.train()(x).loss.backward()
    for network in (model.encoder, model.decoder):
        assert network.linears[-1].weight.grad.abs().sum() > 0
        assert network.skip.weight.grad.abs().sum() > 0


def test_separation_is_part_of_the_loss_in_training_alone():
    rows = torch.tensor([[3.0, 1.0], [3.0, 1.2], [-4.0, 0.0]])
    plain = linear_model(CODEBOOKS).train()(rows)
    apart = linear_model(CODEBOOKS, separation_weight=10.0, separation_margin=0.5).train()
    output = apart(rows)
    assert output.codes.tolist() == [[0, 1], [0, 1], [1, 1]]
    # The last level gets (1, 1), (1, 1.2) and (1, 0), 0.25, 0.49 and 0.25 from (1, 0.5). The first row keeps that code,
    # the second is to prefer (-1, 0), which is 4 + 1.44 away.
    expected = (5.44 - 0.49 + 0.5 * 0.33) / 3
    assert output.separation_loss.item() == pytest.approx(expected)
    assert output.loss.item() == pytest.approx(plain.loss.item() + 10 * expected)
    assert apart.eval()(rows).loss.item() == pytest.approx(plain.loss.item())


def test_separation_looks_at_the_codes_of_evaluation():
    model = linear_model(CODEBOOKS, separation_weight=1.0, sinkhorn_epsilon=(0.0, 0.01)).train()
    output = model(torch.tensor([[3.0, 1.0], [3.0, 1.2]]))
    assert output.codes[:, 1].unique().tolist() == [0, 1]
    assert output.separation_loss > 0
