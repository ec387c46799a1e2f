"""The autoencoder: contracts of its methods, names of its weights, sizes of the published ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import kl_vae
from kl_vae import AutoEncoderKL, DDConfig, DiagonalGaussianDistribution
from kl_vae.optim.config import OptimizerConfig
from tests.messages import mentions

Config = dict[str, Any]


def test_latents_have_embed_dim_channels_and_a_fth_of_the_size(
    tiny_model: AutoEncoderKL,
) -> None:
    x = torch.zeros(2, 3, 6, 20)
    posterior = tiny_model.encode(x)
    assert tiny_model.downsampling_factor == 2
    assert tiny_model.latent_channels == 3
    assert posterior.mean.shape == (2, 3, 3, 10)
    assert tiny_model.decode(posterior.mean).shape == x.shape


def test_without_embed_dim_there_are_no_quant_convolutions(tiny_ddconfig: Config) -> None:
    model = AutoEncoderKL(DDConfig.from_dict(tiny_ddconfig), embed_dim=None)
    assert model.latent_channels == 4
    assert not [key for key in model.state_dict() if "quant" in key]
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(model.encode(x).parameters, model.encoder(x))
    z = torch.rand(1, 4, 8, 8)
    assert torch.equal(model.decode(z), model.decoder(z))


def test_forward_decodes_a_sample_or_the_mode(tiny_model: AutoEncoderKL, images: Tensor) -> None:
    noise = torch.randn(2, 3, 8, 8)
    reconstruction, posterior = tiny_model(images, noise=noise)
    assert isinstance(posterior, DiagonalGaussianDistribution)
    expected = tiny_model.decode(posterior.mean + posterior.std * noise)
    torch.testing.assert_close(reconstruction, expected)
    reconstruction, posterior = tiny_model(images, sample_posterior=False)
    torch.testing.assert_close(reconstruction, tiny_model.decode(posterior.mean))
    assert not torch.equal(tiny_model(images)[0], tiny_model(images)[0])


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((1, 4, 16, 16), ("[1, 4, 16, 16]", "[B, 3, H, W]")),
        ((3, 16, 16), ("[3, 16, 16]", "[B, 3, H, W]")),
        ((1, 3, 16, 17), ("17 x 16", 2)),
    ],
)
def test_encode_rejects_invalid_shapes(
    tiny_model: AutoEncoderKL, shape: tuple[int, ...], parts: tuple[object, ...]
) -> None:
    with pytest.raises(ValueError, match=mentions(*parts)):
        tiny_model.encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 8, 8)])
def test_decode_rejects_invalid_shapes(tiny_model: AutoEncoderKL, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=mentions(list(shape), "[B, 3, h, w]")):
        tiny_model.decode(torch.zeros(shape))


def test_a_context_conditions_encoder_and_decoder(tiny_ddconfig: Config, images: Tensor) -> None:
    model = AutoEncoderKL(tiny_ddconfig | {"context_channels": 5}, embed_dim=3)
    first, second = torch.randn(2, 2, 5)
    assert not torch.allclose(model.encode(images, first).mean, model.encode(images, second).mean)
    z = torch.randn(2, 3, 8, 8)
    assert not torch.allclose(model.decode(z, first), model.decode(z, second))
    reconstruction, posterior = model(images, sample_posterior=False, context=first)
    torch.testing.assert_close(reconstruction, model.decode(posterior.mean, first))


def test_a_context_that_does_not_fit_is_refused(
    tiny_ddconfig: Config, tiny_model: AutoEncoderKL, images: Tensor
) -> None:
    model = AutoEncoderKL(tiny_ddconfig | {"context_channels": 5}, embed_dim=3)
    with pytest.raises(ValueError, match=mentions("context=None", "[B, 5]")):
        model(images)
    with pytest.raises(ValueError, match=mentions("context", "[2, 4]", "[B, 5]")):
        model.decode(torch.zeros(2, 3, 8, 8), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=mentions("context", "context_channels")):
        tiny_model.encode(images, torch.zeros(2, 5))


@pytest.mark.parametrize(
    ("keys", "arguments", "parts"),
    [
        ({"double_z": False}, {}, ("double_z=False",)),
        ({"give_pre_end": True}, {}, ("give_pre_end=True",)),
        ({"out_ch": 1}, {}, ("out_ch=1", 3, "in_channels")),
        ({"ch": 48}, {}, ("ch=48", 32)),
        ({}, {"embed_dim": 0}, ("embed_dim=0", 1, "null")),
        ({}, {"embed_dim": "3"}, ("embed_dim='3'", 1, "null")),
        ({}, {"colorize_nlabels": 12}, ("colorize_nlabels=12", "in_channels=3", "null")),
    ],
)
def test_invalid_autoencoders_are_rejected(
    tiny_ddconfig: Config, keys: Config, arguments: Config, parts: tuple[object, ...]
) -> None:
    with pytest.raises(ValueError, match=mentions(*parts)):
        AutoEncoderKL(tiny_ddconfig | keys, **{"embed_dim": 3} | arguments)


def test_pictures_of_up_to_three_channels_keep_their_values(tiny_model: AutoEncoderKL) -> None:
    x = 2.0 * torch.rand(2, 3, 4, 4) - 1.0
    assert torch.equal(tiny_model.to_rgb(x), x)
    assert torch.equal(tiny_model.to_rgb(x[:, :1]), x[:, :1].repeat(1, 3, 1, 1))
    two = tiny_model.to_rgb(x[:, :2])
    assert torch.equal(two[:, :2], x[:, :2])
    assert torch.equal(two[:, 2], torch.zeros(2, 4, 4))
    assert torch.equal(tiny_model.to_rgb(torch.cat((x, x), dim=1)), x)


@pytest.mark.parametrize("channels", [4, 12])
def test_colorize_projects_many_channels_to_the_whole_range(
    tiny_ddconfig: Config, channels: int
) -> None:
    config = tiny_ddconfig | {"in_channels": channels, "out_ch": channels}
    model = AutoEncoderKL(config, embed_dim=3, colorize_nlabels=channels)
    x = torch.rand(2, channels, 4, 4)
    picture = model.to_rgb(x)
    assert picture.shape == (2, 3, 4, 4)
    torch.testing.assert_close(picture.amin((1, 2, 3)), torch.full((2,), -1.0))
    torch.testing.assert_close(picture.amax((1, 2, 3)), torch.full((2,), 1.0))
    # an affine function of the projection, each image its own
    projected = F.conv2d(x, model.colorize)[0].flatten()
    assert torch.stack((projected, picture[0].flatten())).corrcoef()[0, 1] > 0.9999
    assert model.to_rgb(torch.zeros(1, channels, 4, 4)).isfinite().all()
    # the same colours in every model, and kept with the weights
    again = AutoEncoderKL(config, embed_dim=3, colorize_nlabels=channels)
    assert torch.equal(again.state_dict()["colorize"], model.state_dict()["colorize"])


def test_the_spelling_of_latent_diffusion_is_the_same_class() -> None:
    assert kl_vae.AutoencoderKL is kl_vae.AutoEncoderKL


def test_weights_are_named_as_published(tiny_model: AutoEncoderKL) -> None:
    shapes = {key: tuple(x.shape) for key, x in tiny_model.state_dict().items()}
    published = {
        "encoder.conv_in.weight": (32, 3, 3, 3),
        "encoder.down.0.block.0.norm1.weight": (32,),
        "encoder.down.0.downsample.conv.weight": (32, 32, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (64, 32, 1, 1),
        "encoder.down.1.attn.0.proj_out.weight": (64, 64, 1, 1),
        "encoder.mid.block_1.conv1.weight": (64, 64, 3, 3),
        "encoder.mid.attn_1.norm.weight": (64,),
        "encoder.norm_out.bias": (64,),
        "encoder.conv_out.weight": (8, 64, 3, 3),
        "quant_conv.weight": (6, 8, 1, 1),
        "post_quant_conv.weight": (4, 3, 1, 1),
        "decoder.conv_in.weight": (64, 4, 3, 3),
        "decoder.mid.attn_1.q.weight": (64, 64, 1, 1),
        "decoder.mid.block_2.conv2.bias": (64,),
        "decoder.up.1.block.1.norm1.weight": (64,),
        "decoder.up.1.attn.1.k.weight": (64, 64, 1, 1),
        "decoder.up.1.upsample.conv.weight": (64, 64, 3, 3),
        "decoder.up.0.block.0.nin_shortcut.weight": (32, 64, 1, 1),
        "decoder.norm_out.weight": (32,),
        "decoder.conv_out.weight": (3, 32, 3, 3),
    }
    assert published.items() <= shapes.items()
    assert {key.split(".")[0] for key in shapes} == {
        *("encoder", "decoder", "quant_conv", "post_quant_conv"),
    }
    assert tiny_model.get_last_layer() is tiny_model.decoder.conv_out.weight


@pytest.mark.parametrize(
    ("ch_mult", "z_channels", "embed_dim", "attn_resolutions", "count"),
    [
        pytest.param([1, 2, 4], 3, 3, [], 55_312_063, id="kl-f4"),
        pytest.param([1, 2, 4, 4], 4, 4, [], 83_653_863, id="kl-f8"),
        pytest.param([1, 1, 2, 2, 4], 16, 16, [16], 69_610_963, id="kl-f16"),
        pytest.param([1, 1, 2, 2, 4, 4], 64, 64, [16, 8], 103_880_131, id="kl-f32"),
        pytest.param([1, 2, 4, 4], 16, None, [], 83_819_683, id="SD3 and FLUX.1"),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(
    ch_mult: list[int],
    z_channels: int,
    embed_dim: int | None,
    attn_resolutions: list[int],
    count: int,
) -> None:
    ddconfig = DDConfig(
        ch=128,
        out_ch=3,
        ch_mult=tuple(ch_mult),
        num_res_blocks=2,
        attn_resolutions=tuple(attn_resolutions),
        in_channels=3,
        resolution=256,
        z_channels=z_channels,
    )
    with torch.device("meta"):
        model = AutoEncoderKL(ddconfig, embed_dim)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_the_loss_of_none_is_mse_and_half_the_kl(tiny_model: AutoEncoderKL, images: Tensor) -> None:
    torch.manual_seed(5)
    total = tiny_model.training_step(images, 0)
    torch.manual_seed(5)
    reconstruction, posterior = tiny_model(images)
    mean, logvar = posterior.mean, posterior.logvar
    kl = 0.5 * (mean**2 + logvar.exp() - 1.0 - logvar).sum((1, 2, 3)).mean()
    mse = F.mse_loss(reconstruction, images)
    torch.testing.assert_close(total, mse + 0.5 * kl)
    total, log = tiny_model.default_loss(images, reconstruction, posterior, 0, split="val")
    torch.testing.assert_close(total, mse + 0.5 * kl)
    assert log == {"val/total_loss": total, "val/rec_loss": mse, "val/kl_loss": kl}


def test_the_steps_are_one_code_path(tiny_ddconfig: Config, images: Tensor) -> None:
    lossconfig = {"target": "elbo", "params": {"kl_weight": 1.0, "kl_warmup_steps": 4}}
    model = AutoEncoderKL(tiny_ddconfig, 3, lossconfig)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(5)
    total = model.training_step(images, 3)
    assert torch.equal(total, model.step(images, 3, "train", noise=noise).total)
    torch.manual_seed(5)
    figures = model.validation_step(images, 3)
    assert figures == model.step(images, 3, "val", noise=noise).log
    assert torch.equal(figures["val/total_loss"], total.detach())
    assert figures["val/kl_weight"] == 0.75  # batch_idx counts the steps so far
    assert not any(value.requires_grad for value in figures.values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_step_calls_the_wrapper_it_is_given(tiny_model: AutoEncoderKL, images: Tensor) -> None:
    class Wrapper(nn.Module):
        calls = 0

        def forward(self, *arguments: Any, **keywords: Any) -> Any:
            self.calls += 1
            return tiny_model(*arguments, **keywords)

    wrapped = Wrapper()
    out = tiny_model.step(images, 0, "train", forward=wrapped, noise=torch.zeros(2, 3, 8, 8))
    assert wrapped.calls == 1
    mode, posterior = tiny_model(images, sample_posterior=False)
    torch.testing.assert_close(out.reconstruction, mode)
    torch.testing.assert_close(out.posterior.mean, posterior.mean)


def test_autocast_ends_before_the_loss(tiny_ddconfig: Config, images: Tensor) -> None:
    seen: list[torch.dtype] = []

    def loss(
        inputs: Tensor, reconstructions: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        product = inputs[0, 0] @ reconstructions[0, 0]
        seen.extend((reconstructions.dtype, product.dtype))
        return product.sum(), {}

    model = AutoEncoderKL(tiny_ddconfig, 3, loss)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.step(images, 0, "train").reconstruction.dtype == torch.bfloat16
    assert seen == [torch.float32, torch.float32]


def test_an_own_callable_is_the_loss(tiny_ddconfig: Config, images: Tensor) -> None:
    given: dict[str, Any] = {}

    def loss(*arguments: Tensor, **keywords: Any) -> tuple[Tensor, dict[str, Tensor]]:
        given.update(keywords)
        inputs, reconstructions, _ = arguments
        total = (inputs - reconstructions).abs().sum()
        return total, {"train/mine": total.detach()}

    model = AutoEncoderKL(tiny_ddconfig, 3, loss)
    out = model.step(images, 7, "train")
    torch.testing.assert_close(out.total, (images - out.reconstruction).abs().sum())
    assert out.log.keys() == {"train/mine", "train/total_loss"}
    assert (
        out.log["train/total_loss"] == out.total and not out.log["train/total_loss"].requires_grad
    )
    assert given == {
        "global_step": 7,
        "last_layer": model.get_last_layer(),
        "split": "train",
    }


def test_configure_optimizers_covers_the_autoencoder_and_its_loss(tiny_ddconfig: Config) -> None:
    lossconfig = {"target": "elbo", "params": {"learn_logvar": True}}
    model = AutoEncoderKL(tiny_ddconfig, 3, lossconfig)
    optimizer = model.configure_optimizers(OptimizerConfig(learning_rate=0.5, name="adam"))
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(p) for p in model.parameters()}
    assert any(parameter is model.loss.logvar for parameter in held)
    assert type(optimizer) is torch.optim.Adam
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert model.configure_optimizers().param_groups[0]["lr"] == OptimizerConfig().learning_rate


def test_a_few_steps_lower_the_loss(tiny_ddconfig: Config, images: Tensor) -> None:
    torch.manual_seed(0)
    model = AutoEncoderKL(tiny_ddconfig, 3, {"target": "elbo"})
    optimizer = model.configure_optimizers(OptimizerConfig(learning_rate=3e-3))
    losses = []
    for step in range(20):
        loss = model.training_step(images, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_half_precision_goes_in_and_comes_out(tiny_model: AutoEncoderKL, images: Tensor) -> None:
    model = tiny_model.bfloat16()
    assert (model.dtype, model.device) == (torch.bfloat16, torch.device("cpu"))
    with torch.no_grad():
        reconstruction, posterior = model(images.bfloat16())
    assert reconstruction.dtype == torch.bfloat16
    assert posterior.mean.dtype == posterior.kl().dtype == torch.float32
    assert model.decode(posterior.mode()).dtype == torch.bfloat16
    assert model.half()(images.half())[0].dtype == torch.float16


@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (3, 16, 10), (1, 3, 1, 1)])
def test_reconstruct_takes_any_size_and_mode(tiny_ddconfig: Config, shape: tuple[int, ...]) -> None:
    model = AutoEncoderKL(tiny_ddconfig | {"dropout": 0.5}, 3).train()
    x = 2.0 * torch.rand(shape) - 1.0
    out = model.reconstruct(x)
    assert out.shape == x.shape and not out.requires_grad
    assert all(module.training for module in model.modules())
    assert torch.equal(model.eval().reconstruct(x), out)
    if shape[-1] == 10:
        torch.testing.assert_close(out, model(x[None], sample_posterior=False)[0][0])


@pytest.mark.parametrize(
    "given",
    [Image.new("RGB", (16, 16)), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)],
    ids=["PIL", "uint8"],
)
def test_what_is_not_in_minus_one_to_one_names_the_function_to_call(
    tiny_model: AutoEncoderKL, given: Any
) -> None:
    for method in (tiny_model.encode, tiny_model, tiny_model.reconstruct):
        with pytest.raises(ValueError, match=mentions("kl_vae.load_image")):
            method(given)


def test_values_up_to_255_and_posteriors_are_rejected(
    tiny_model: AutoEncoderKL, images: Tensor
) -> None:
    with pytest.raises(ValueError, match=mentions(255, "kl_vae.load_image")):
        tiny_model.encode(torch.full((1, 3, 16, 16), 255.0))
    with pytest.raises(ValueError, match=mentions("posterior", ".sample()", ".mode()")):
        tiny_model.decode(tiny_model.encode(images))  # type: ignore[arg-type]


def test_from_pretrained_takes_paths_and_names_of_the_hub(
    tiny_model: AutoEncoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model.save_compvis("org/name.safetensors")
    again = AutoEncoderKL.from_pretrained("org/name.safetensors")
    assert torch.equal(again.get_last_layer(), tiny_model.get_last_layer())
    asked: list[str] = []
    monkeypatch.setattr(AutoEncoderKL, "from_checkpoint", lambda path, **_: asked.append(path))
    AutoEncoderKL.from_pretrained("org/other", subfolder="vae")
    AutoEncoderKL.from_pretrained(Path("org"))
    assert asked == ["hf://org/other/vae", "org"]
