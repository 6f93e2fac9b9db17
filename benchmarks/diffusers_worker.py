"""The process of diffusers in the comparisons of peers.py: python diffusers_worker.py, commands on stdin.

It needs torch and diffusers only, so that it can run in a Python without this package. Like its counterpart
jax_worker.py it reads a network and images from a folder, and answers the lines of `serve`.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path


def serve(start):
    """Answer each line of stdin, a JSON list of a command and its arguments, with a line of JSON on stdout.

    The first line is a JSON object, the options of `start`, which returns (information, {command: function}). Each
    answer is {"result": ...}, or {"missing": MODULE} where an import fails. Other output goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(call):
        try:
            found = {"result": call()}
        except ImportError as error:
            found = {"missing": error.name}
        print(json.dumps(found), file=answers, flush=True)

    def begin():
        nonlocal commands
        information, commands = start(**json.loads(sys.stdin.readline()))
        return information

    commands = {}
    try:
        answer(begin)
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            answer(lambda: commands[name](*arguments))  # noqa: B023
    except KeyboardInterrupt:
        sys.exit(130)


def peak_memory():
    """The peak resident memory of the process so far, in MB.

    On Linux from /proc: getrusage starts at what the parent process held when it started this one.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def start(folder, threads, T, learning_rate, grad_clip, ema_decay):
    """(text about the versions, the commands) for the network and images in `folder`."""
    import diffusers
    import numpy as np
    import torch
    from diffusers.training_utils import EMAModel

    if threads:
        torch.set_num_threads(threads)
    training = []

    def load():
        return diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=False)

    def prepare():
        net = load().train()
        optimizer = torch.optim.Adam(net.parameters(), learning_rate)
        average = EMAModel(net.parameters(), decay=ema_decay, use_ema_warmup=True)
        images = torch.from_numpy(np.load(f"{folder}/images.npy")).movedim(-1, 1).contiguous() / 127.5 - 1
        return net, optimizer, average, diffusers.DDPMScheduler(T), images

    def train(steps):
        """The seconds of `steps` training steps."""
        if not training:
            training.extend(prepare())
        net, optimizer, average, scheduler, images = training
        begin = time.perf_counter()
        for _ in range(steps):
            noise = torch.randn(images.shape)
            times = torch.randint(T, (len(images),))
            output = net(scheduler.add_noise(images, noise, times), times).sample
            torch.nn.functional.mse_loss(output, noise).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            average.step(net.parameters())
        return time.perf_counter() - begin

    def output(t):
        """Write the network's output for the noisy images of x.npy at time `t` in 1..T to theirs.npy."""
        x = torch.from_numpy(np.load(f"{folder}/x.npy")).movedim(-1, 1).contiguous()
        with torch.no_grad():
            np.save(f"{folder}/theirs.npy", load().eval()(x, t - 1).sample.movedim(1, -1).numpy())

    def sample(steps, name, num):
        """The seconds of `num` samples by the pipeline `name`, ddpm or ddim."""
        scheduler, pipeline = {
            "ddpm": (diffusers.DDPMScheduler, diffusers.DDPMPipeline),
            "ddim": (diffusers.DDIMScheduler, diffusers.DDIMPipeline),
        }[name]
        pipeline = pipeline(load().eval(), scheduler(T))
        pipeline.set_progress_bar_config(disable=True)
        begin = time.perf_counter()
        pipeline(batch_size=num, num_inference_steps=steps, output_type="np")
        return time.perf_counter() - begin

    python = ".".join(map(str, sys.version_info[:2]))
    about = f"{torch.get_num_threads()} threads, Python {python}, torch {torch.__version__}"
    commands = {"train": train, "memory": peak_memory, "output": output, "sample": sample}
    return f"{about}, diffusers {diffusers.__version__}", commands


if __name__ == "__main__":
    serve(start)
