"""What is measured: each case writes its inputs and weights for the Rust side and does the same work in PyTorch."""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from networks import Adm, DdpmPlusPlus, ResNet, SmallCNN, WideResNet
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
# Into how many parts proxyset's training stages cut a batch that has no batch statistics.
PARTS = 4


@dataclass
class Peer:
    """PyTorch's side of a case. `outputs` computes what all sides must agree on; before `run` if at all."""

    run: Callable[[], object]
    outputs: Callable[[], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Variant:
    """One way to run PyTorch."""

    compiled: bool
    channels_last: bool
    device: str = "cpu"
    bf16: bool = False

    @property
    def name(self):
        return f"{'compile' if self.compiled else 'eager'}, {'channels_last' if self.channels_last else 'NCHW'}"

    def place(self, value):
        """A copy of a tensor or module on the device, in this memory format."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        if isinstance(value, torch.nn.Module):
            return copy.deepcopy(value).to(self.device, memory_format=layout)
        return value.to(self.device, copy=True, memory_format=layout if value.dim() == 4 else torch.contiguous_format)

    def compile(self, function):
        return torch.compile(function, dynamic=False) if self.compiled else function

    def network(self, model, training):
        """A placed model as a function with f32 outputs: in bf16 its weights are bf16, in training autocast makes them so."""
        if self.bf16 and training:

            def call(x, *rest, **named):
                with torch.autocast(torch.device(self.device).type, torch.bfloat16):
                    return model(x, *rest, **named)

        elif self.bf16:
            model.to(torch.bfloat16)

            def call(x, *rest, **named):
                return model(x.to(torch.bfloat16), *rest, **named)

        else:
            call = model
        compiled = self.compile(call)
        return lambda *given, **named: in_f32(compiled(*given, **named))


def in_f32(result):
    # diffusers' networks return a tuple.
    return result[0].float() if isinstance(result, tuple) else result.float()


def save_inputs(folder, **tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "inputs.safetensors")


class Case:
    # Whether benches/peers has it in stock candle's ops.
    in_candle = True


class Convolution(Case):
    """With bias; `backward` adds the gradients to input, weight and bias."""

    def __init__(self, kernel, c_in, c_out, side, stride=1, batch=16, *, backward):
        self.stride, self.padding, self.backward = stride, kernel // 2, backward
        out = side // stride
        self.x = torch.randn(batch, c_in, side, side)
        self.weight = torch.randn(c_out, c_in, kernel, kernel) / (c_in * kernel**2) ** 0.5
        self.bias = torch.randn(c_out)
        self.grad = torch.randn(batch, c_out, out, out)
        self.work = {"kind": "conv2d", "stride": stride, "padding": self.padding, "backward": backward}

    def save(self, folder):
        save_inputs(folder, x=self.x, weight=self.weight, bias=self.bias, grad=self.grad)

    def peer(self, variant):
        operands = [variant.place(t) for t in (self.x, self.weight, self.bias)]
        grad = variant.place(self.grad)
        ones = torch.ones_like(grad)
        convolve = variant.compile(lambda x, w, b: F.conv2d(x, w, b, self.stride, self.padding))

        def forward():
            with torch.no_grad():
                return convolve(*operands)

        def gradients(of):
            return torch.autograd.grad(convolve(*operands), operands, of)

        def outputs():
            found = {"y": forward()}
            if self.backward:
                found |= dict(zip(("grad_x", "grad_weight", "grad_bias"), gradients(grad)))
            return found

        for operand in operands:
            operand.requires_grad_(self.backward)
        return Peer((lambda: gradients(ones)) if self.backward else forward, outputs)


class DenoisingStep(Case):
    """A U-Net's noise at one step; `backward`: the gradients of the training loss to all parameters."""

    def __init__(self, folder, batch, *, backward, parts=PARTS):
        self.folder, self.backward, self.t = folder, backward, 500
        self.model = UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False).eval()
        config = self.model.config
        shape = (batch, config.in_channels, config.sample_size, config.sample_size)
        self.x, self.noise = torch.randn(shape), torch.randn(shape)
        classes = config.num_class_embeds
        self.labels = torch.arange(batch) % classes if classes else None
        self.work = {"kind": "denoise", "t": self.t}
        if backward:
            self.work = {"kind": "denoise_gradients", "t": self.t, "parts": parts}

    def save(self, folder):
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        labels = {} if self.labels is None else {"labels": self.labels.to(torch.uint32)}
        save_inputs(folder, x=self.x, noise=self.noise, **labels)

    def peer(self, variant):
        model = variant.place(self.model)
        x, noise = variant.place(self.x), variant.place(self.noise)
        t = torch.full((len(x),), float(self.t), device=variant.device)
        labels = None if self.labels is None else variant.place(self.labels)
        network = variant.network(model, self.backward)

        def predict():
            return network(x, t, class_labels=labels, return_dict=False)

        def forward():
            with torch.no_grad():
                return predict()

        def step():
            model.zero_grad(set_to_none=True)
            F.mse_loss(predict(), noise).backward()

        def outputs():
            found = {"eps": forward()}
            if self.backward:
                step()
                found |= {f"gradient.{name}": p.grad for name, p in model.named_parameters()}
            return found

        return Peer(step if self.backward else forward, outputs)


class Sampling(DenoisingStep):
    """Images from noise by DDIM without a share of noise."""

    in_candle = False

    def __init__(self, folder, batch, steps):
        super().__init__(folder, batch, backward=False)
        self.scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        self.scheduler.set_timesteps(steps)
        self.work = {"kind": "sample", "steps": steps}

    def peer(self, variant):
        network = variant.network(variant.place(self.model), False)
        labels = None if self.labels is None else variant.place(self.labels)
        noise = variant.place(self.x)

        def run():
            x = noise
            with torch.no_grad():
                for t in self.scheduler.timesteps:
                    # A number is copied to the device in each step, a tensor is there.
                    steps = torch.full((len(x),), float(t), device=variant.device)
                    eps = network(x, steps, class_labels=labels, return_dict=False)
                    x = self.scheduler.step(eps, int(t), x).prev_sample
            return x

        return Peer(run, lambda: {"images": run()})


class OtherDenoisingStep(DenoisingStep):
    """The same of a network that diffusers does not have; `config` is what proxyset's `unet/config.json` says about it."""

    in_candle = False

    def __init__(self, model, name, config, shape, *, backward, parts=PARTS):
        self.model, self.name, self.config, self.t, self.backward = model.eval(), name, config, 500, backward
        self.x, self.noise, self.labels = torch.randn(shape), torch.randn(shape), None
        self.work = {"kind": "denoise", "t": self.t}
        if backward:
            self.work = {"kind": "denoise_gradients", "t": self.t, "parts": parts}

    def save(self, folder):
        (folder / "unet").mkdir()
        save_file(self.model.state_dict(), folder / "unet" / "diffusion_pytorch_model.safetensors")
        (folder / "unet" / "config.json").write_text(json.dumps(self.config))
        DDPMScheduler().save_pretrained(folder / "scheduler")
        index = {"unet": ["diffusers", self.name], "scheduler": ["diffusers", "DDPMScheduler"]}
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"} | index))
        save_inputs(folder, x=self.x, noise=self.noise)


class Classifier(Case):
    """The logits of a batch; `attack`: a step of adversarial training instead.

    `config` is what proxyset's `config.json` says about the network. PGD starts from the images themselves, so
    that both sides do the same arithmetic. Batch statistics are in training mode throughout a step.
    """

    SGD = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 5e-4}

    def __init__(self, model, config, shape, *, attack=None, parts=1):
        self.model, self.attack = model.train(bool(attack)), attack
        self.config = config | {"class_names": [str(i) for i in range(10)]}
        self.x = torch.rand(shape)
        self.labels = torch.arange(len(self.x)) % 10
        self.work = {"kind": "logits"}
        if attack:
            self.work = {"kind": "pgd_step", "attack": attack, "sgd": self.SGD, "parts": parts}

    def save(self, folder):
        save_file(self.model.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config))
        save_inputs(folder, x=self.x, labels=self.labels.to(torch.uint32))

    def peer(self, variant):
        model, x, labels = (variant.place(value) for value in (self.model, self.x, self.labels))
        logits_of = variant.network(model, bool(self.attack))
        optimizer = torch.optim.SGD(
            model.parameters(),
            lr=self.SGD["learning_rate"],
            momentum=self.SGD["momentum"],
            weight_decay=self.SGD["weight_decay"],
            fused=True,
        )

        def ascend(x_adv, gradient):
            epsilon = self.attack["epsilon"]
            moved = x_adv + self.attack["step_size"] * gradient.sign()
            return torch.clamp(torch.clamp(moved, x - epsilon, x + epsilon), 0, 1)

        ascend = variant.compile(ascend)

        def perturb():
            # Compiled code computes every gradient that is asked for by anyone: the weights ask for none.
            model.requires_grad_(False)
            x_adv = x
            for _ in range(self.attack["steps"]):
                x_adv = x_adv.detach().requires_grad_()
                loss = F.cross_entropy(logits_of(x_adv), labels, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, x_adv)
                with torch.no_grad():
                    x_adv = ascend(x_adv, gradient)
            model.requires_grad_(True)
            return x_adv.detach()

        def step():
            x_adv = perturb()
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits_of(x_adv), labels).backward()
            optimizer.step()

        def forward():
            with torch.no_grad():
                return logits_of(x)

        def outputs():
            if not self.attack:
                return {"logits": forward()}
            images = x.clone().requires_grad_()
            logits = logits_of(images)
            F.cross_entropy(logits, labels).backward()
            found = {f"gradient.{name}": p.grad for name, p in model.named_parameters()}
            found |= {"logits": logits, "image_gradient": images.grad}
            found["attacked_loss"] = F.cross_entropy(logits_of(perturb()), labels)
            step()
            return found | {f"updated.{name}": p.detach() for name, p in model.named_parameters()}

        return Peer(step if self.attack else forward, outputs)


CIFAR10_UNET = dict(
    # google/ddpm-cifar10-32
    sample_size=32,
    in_channels=3,
    out_channels=3,
    center_input_sample=False,
    time_embedding_type="positional",
    freq_shift=1,
    flip_sin_to_cos=False,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(128, 256, 256, 256),
    layers_per_block=2,
    mid_block_scale_factor=1,
    downsample_padding=0,
    act_fn="silu",
    attention_head_dim=None,
    norm_num_groups=32,
    norm_eps=1e-6,
)


def cifar10_unet(scratch):
    folder = scratch / "ddpm-cifar10"
    if not folder.exists():
        model = UNet2DModel(**CIFAR10_UNET)
        assert model.num_parameters() == 35_746_307
        DDPMPipeline(model, DDPMScheduler()).save_pretrained(folder)
    return folder


def ddpm_plus_plus(batch, **options):
    """EDM's network for CIFAR-10."""
    sizes = {"model_channels": 128, "channel_mult": [2, 2, 2], "num_blocks": 4, "attn_resolutions": [16]}
    model = DdpmPlusPlus(32, 3, **sizes)
    assert sum(parameter.numel() for parameter in model.parameters()) == 55_732_739
    config = sizes | {"img_resolution": 32, "in_channels": 3, "out_channels": 3}
    return OtherDenoisingStep(model, "SongUNet", config, (batch, 3, 32, 32), **options)


def adm(batch, **options):
    """As large as improved-diffusion's network for CIFAR-10."""
    sizes = {"model_channels": 128, "channel_mult": [1, 2, 2, 2], "num_res_blocks": 3, "attention_resolutions": [2, 4]}
    config = sizes | {"image_size": 32, "in_channels": 3, "out_channels": 3, "num_head_channels": 64}
    config |= {"use_scale_shift_norm": True, "resblock_updown": True}
    return OtherDenoisingStep(Adm(3, **sizes), "UNetModel", config, (batch, 3, 32, 32), **options)


def small_cnn(batch, **options):
    """The classifier of pipelines/digits.toml."""
    config = {"arch": "small_cnn", "in_channels": 1, "image_size": 8, "channels": [16, 32], "num_classes": 10, "groups": 8}
    model = SmallCNN(config["in_channels"], config["channels"], config["num_classes"], config["groups"])
    return Classifier(model, config, (batch, 1, 8, 8), **options)


def resnet18(batch, **options):
    """In the form for CIFAR-10."""
    config = {"arch": "resnet", "in_channels": 3, "image_size": 32, "num_classes": 10}
    return Classifier(ResNet((2, 2, 2, 2), config["num_classes"]), config, (batch, 3, 32, 32), **options)


def wide_resnet(batch, **options):
    """WRN-28-10."""
    config = {"arch": "wide_resnet", "in_channels": 3, "image_size": 32, "num_classes": 10, "depth": 28, "width": 10}
    return Classifier(WideResNet(28, 10, config["num_classes"]), config, (batch, 3, 32, 32), **options)


CONVOLUTIONS = {
    "conv3x3_32_32_32": (3, 32, 32, 32),
    "conv3x3_64_64_32": (3, 64, 64, 32),
    "conv3x3_128_128_32": (3, 128, 128, 32),
    "conv3x3_256_256_16": (3, 256, 256, 16),
    "conv3x3_512_512_8": (3, 512, 512, 8),
    "conv3x3_3_128_32": (3, 3, 128, 32),
    "conv3x3_128_256_32_stride2": (3, 128, 256, 32, 2),
    "conv1x1_256_256_16": (1, 256, 256, 16),
}
PGD10 = {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 10}
DIGITS_DDPM = ROOT / "models" / "digits-ddpm"


def gpu_cases():
    """Name to a function of the scratch folder that makes the case."""
    found = {}
    for batch in (128, 512, 2048):
        found[f"unet_ddim10_b{batch}"] = lambda scratch, batch=batch: Sampling(cifar10_unet(scratch), batch, 10)
    found["unet_b128_fwdbwd"] = lambda scratch: DenoisingStep(cifar10_unet(scratch), 128, backward=True, parts=1)
    found["resnet18_b1024"] = lambda _: resnet18(1024)
    found["resnet18_pgd10_b256"] = lambda _: resnet18(256, attack=PGD10, parts=1)
    found["wrn28_10_pgd10_b128"] = lambda _: wide_resnet(128, attack=PGD10, parts=1)
    return found


def cases():
    """The same for the CPU."""
    found = {}
    for name, shape in CONVOLUTIONS.items():
        for suffix, backward in (("fwd", False), ("fwdbwd", True)):
            found[f"{name}_{suffix}"] = lambda _, shape=shape, backward=backward: Convolution(*shape, backward=backward)
    for batch in (8, 32):
        found[f"unet_b{batch}"] = lambda scratch, batch=batch: DenoisingStep(cifar10_unet(scratch), batch, backward=False)
    found["ddpmpp_b8"] = lambda _: ddpm_plus_plus(8, backward=False)
    found["adm_b8_fwdbwd"] = lambda _: adm(8, backward=True)
    found["digits_unet_b64"] = lambda _: DenoisingStep(DIGITS_DDPM, 64, backward=False)
    found["digits_unet_b64_fwdbwd"] = lambda _: DenoisingStep(DIGITS_DDPM, 64, backward=True)
    found["digits_unet_ddim10_b64"] = lambda _: Sampling(DIGITS_DDPM, 64, 10)
    found["small_cnn_b128"] = lambda _: small_cnn(128)
    found["small_cnn_pgd10_b128"] = lambda _: small_cnn(128, attack=PGD10, parts=PARTS)
    # Batch statistics need the whole batch.
    found["resnet18_pgd10_b64"] = lambda _: resnet18(64, attack=PGD10, parts=1)
    return found
