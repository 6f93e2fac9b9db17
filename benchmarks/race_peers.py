"""The process of another project's recipe in race.py: python race_peers.py JSON; needs that project and NumPy only.

It trains until the time is over, draws samples with the project's own sampler and writes samples.npz and training.json.
The settings are the documented defaults of diffusers' examples/unconditional_image_generation/train_unconditional.py
(with --use_ema) and of denoising-diffusion-pytorch's README and Trainer. Two things differ, both in their favour:
the cosine of the learning rate ends with the given time, not after 100 epochs; images whose size a network cannot halve
are padded by their edges, and the samples are cropped.
"""

import itertools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np

WINDOW = 100  # steps in a point of the loss curve
SCRIPT = {  # train_unconditional.py
    "library": "diffusers",
    "layout": "",  # a config of ours with the same network; the script's own network when empty
    "learning_rate": 1e-4,
    "betas": (0.95, 0.999),
    "weight_decay": 1e-6,
    "warmup_steps": 500,
    "decay": "cosine",
    "batch_size": 16,
    "flip": False,
    "ema_decay": 0.9999,
    "ema_power": 0.75,
    "prediction": "epsilon",
    "sampler": "ddpm",
}
SMALL = SCRIPT | {"layout": "folder_cpu"}
BEST = SMALL | {
    "learning_rate": 1e-3,
    "betas": (0.9, 0.999),
    "weight_decay": 0.0,
    "warmup_steps": 100,
    "batch_size": 32,
    "ema_decay": 0.999,
}
DDPM_PYTORCH = {  # the README's Trainer, with a narrower network
    "library": "denoising_diffusion_pytorch",
    "layout": "",
    "dim": 32,
    "learning_rate": 8e-5,
    "batch_size": 32,
    "accumulate": 2,
    "flip": True,
    "ema_decay": 0.995,
}
PEERS = {"diffusers": SCRIPT, "diffusers_small": SMALL, "diffusers_best": BEST, "ddpm_pytorch": DDPM_PYTORCH}
LEVELS = {"diffusers": 6, "denoising_diffusion_pytorch": 4}  # of the networks without a layout


def batches(images, batch_size, flip, seed):
    """Yield float32 batches (b, C, H, W) in 0..1 of uint8 images (N, H, W, C), in a new order in each epoch."""
    random, number = np.random.default_rng(seed), len(images) // batch_size
    while True:
        for rows in np.split(random.permutation(len(images))[: number * batch_size], number):
            batch = images[rows]
            if flip:
                flipped = random.random(len(batch)) < 0.5
                batch[flipped] = batch[flipped][:, :, ::-1]
            yield np.ascontiguousarray(batch.transpose(0, 3, 1, 2), np.float32) / 255


def pad(images, multiple):
    """uint8 (N, H, W, C) padded by its edges so that `multiple` divides H and W."""
    missing = [-side % multiple for side in images.shape[1:3]]
    margins = [(total // 2, total - total // 2) for total in missing]
    return np.pad(images, ((0, 0), *margins, (0, 0)), mode="edge")


def crop(images, shape):
    """The inverse of `pad`, for images of the shape (H, W, C) before."""
    top, left = ((now - before) // 2 for now, before in zip(images.shape[1:3], shape, strict=False))
    return images[:, top : top + shape[0], left : left + shape[1]]


def learning_rate(step, elapsed, warm, settings):
    """The rate at `step` (from 0): a linear warm-up, then constant or half a cosine that ends with the time.

    elapsed, warm: the share of the time that has passed, now and at the end of the warm-up.
    """
    rate = settings["learning_rate"]
    if step < settings["warmup_steps"]:
        return rate * step / settings["warmup_steps"]
    progress = min(1.0, (elapsed - warm) / max(1e-9, 1 - warm))
    return rate * (0.5 * (1 + math.cos(math.pi * progress)) if settings["decay"] == "cosine" else 1)


def make_diffusers(settings, unet, shape):
    """(take_step(images, elapsed) -> loss, sample(num, steps, generator) -> float (N, C, H, W) in 0..1, version)."""
    import diffusers
    import torch
    from diffusers.training_utils import EMAModel

    height, width, channels = shape
    size = {"sample_size": (height, width), "in_channels": channels, "out_channels": channels}
    net = diffusers.UNet2DModel.from_config(unet) if unet else diffusers.UNet2DModel(**size, **script_network())
    optimizer = torch.optim.AdamW(
        net.parameters(), settings["learning_rate"], settings["betas"], 1e-8, settings["weight_decay"]
    )
    average = EMAModel(
        net.parameters(), settings["ema_decay"], use_ema_warmup=True, inv_gamma=1.0, power=settings["ema_power"]
    )
    scheduler = diffusers.DDPMScheduler(1000, beta_schedule="linear", prediction_type=settings["prediction"])
    net.train()
    steps, warm = itertools.count(), 0.0

    def take_step(images, elapsed):
        nonlocal warm
        step = next(steps)
        if step <= settings["warmup_steps"]:
            warm = elapsed
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, elapsed, warm, settings)
        clean = 2 * torch.from_numpy(images) - 1
        noise = torch.randn_like(clean)
        times = torch.randint(0, 1000, (len(clean),))
        output = net(scheduler.add_noise(clean, noise, times), times).sample
        target = noise if settings["prediction"] == "epsilon" else scheduler.get_velocity(clean, noise, times)
        loss = torch.nn.functional.mse_loss(output, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(net.parameters())
        return loss.item()

    def sample(num, steps, generator):
        average.copy_to(net.parameters())
        net.eval()
        kinds = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "dpmpp": "DPMSolverMultistepScheduler"}
        chosen = getattr(diffusers, kinds[settings["sampler"]]).from_config(scheduler.config)
        chosen.set_timesteps(steps)
        images = torch.randn((num, channels, height, width), generator=generator)
        for t in chosen.timesteps:
            images = chosen.step(net(images, t).sample, t, images, generator=generator).prev_sample
        return images / 2 + 0.5

    return take_step, sample, f"diffusers {diffusers.__version__}"


def script_network():
    """The options of the script's UNet2DModel."""
    down, up = ["DownBlock2D"] * 6, ["UpBlock2D"] * 6
    down[4], up[1] = "AttnDownBlock2D", "AttnUpBlock2D"
    widths = (128, 128, 256, 256, 512, 512)
    return {"layers_per_block": 2, "block_out_channels": widths, "down_block_types": down, "up_block_types": up}


def make_ddpm_pytorch(settings, _, shape):
    """make_diffusers for denoising-diffusion-pytorch."""
    import torch
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from denoising_diffusion_pytorch.version import __version__
    from ema_pytorch import EMA

    height, width, channels = shape
    net = Unet(dim=settings["dim"], dim_mults=(1, 2, 4, 8), channels=channels)
    diffusion = GaussianDiffusion(net, image_size=(height, width), timesteps=1000, sampling_timesteps=50)
    optimizer = torch.optim.Adam(diffusion.parameters(), settings["learning_rate"], (0.9, 0.99))
    average = EMA(diffusion, beta=settings["ema_decay"], update_every=10)
    number = settings["accumulate"]

    def take_step(images, elapsed):
        losses = [diffusion(torch.from_numpy(part)) / number for part in np.split(images, number)]
        for loss in losses:
            loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        return sum(loss.item() for loss in losses)

    def sample(num, steps, generator):
        average.ema_model.eval()
        average.ema_model.sampling_timesteps = steps
        return average.ema_model.sample(batch_size=num)

    return take_step, sample, f"denoising-diffusion-pytorch {__version__}"


def main(out, data, start, minutes, threads, seed, num, evaluations, multiple, unet, settings):
    """Train until `minutes` after the time `start`, and write samples.npz and training.json to the folder `out`."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    images = np.load(data)["images"]
    shape, images, seconds = images.shape[1:], pad(images, multiple), 60 * minutes
    make = {"diffusers": make_diffusers, "denoising_diffusion_pytorch": make_ddpm_pytorch}[settings["library"]]
    take_step, sample, version = make(settings, unet, images.shape[1:])
    batch_size, losses, times = settings["batch_size"] * settings.get("accumulate", 1), [], []
    if batch_size > len(images):
        sys.exit(f"batches of {batch_size}, but there are only {len(images)} images")
    source = batches(images, batch_size, settings["flip"], seed)
    while (elapsed := time.time() - start) < seconds:
        times.append(elapsed)
        losses.append(take_step(next(source), elapsed / seconds))
    steps, took = len(losses), time.time() - start
    if not steps:
        sys.exit(f"no training step within {minutes:g} minutes")
    curve = [[n, float(np.mean(losses[max(0, n - WINDOW) : n]))] for n in [*range(WINDOW, steps, WINDOW), steps]]
    speed = batch_size * (steps - 1) / (times[-1] - times[0]) if steps > 1 else None
    record = {"steps": steps, "seconds": took, "batch_size": batch_size, "images_per_second": speed, "curve": curve}
    record |= {"versions": f"{version}, torch {torch.__version__}"}
    Path(out, "training.json").write_text(json.dumps(record))
    generator, drawn = torch.Generator().manual_seed(seed), []
    with torch.no_grad():
        for first in range(0, num, 64):
            found = sample(min(64, num - first), evaluations, generator)
            drawn.append((255 * found.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).numpy())
    np.savez(Path(out, "samples.npz"), images=crop(np.concatenate(drawn), shape))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
