"""How fast a DiT trains and samples on this CPU, beside the same in PyTorch: eager, float32, on as many cores.

python -m tests.speed.against_torch --size=S/2 --batch_size=8 --what=train

Not a test: it prints times. PyTorch's side is written as the released code is: its model, hybrid loss and AdamW, an EMA
by a loop over the parameters, guided DDIM over doubled batches. Each side has a process of its own, and they work
in turn, a short window each, so that whatever else the machine does slows both. The ratio is the median over pairs of
windows: above 1, JAX is the faster. Keys of the size's config are set with --config.KEY=VALUE.
"""

import argparse
import dataclasses
import multiprocessing
import os
import statistics
import sys
import time
import traceback

from dit_jax.cli.main import HUGE_PAGES, split_overrides
from dit_jax.config import Config, load_config
from tests.children import child_error

NUM_SAMPLING_STEPS = 50
CFG_SCALE = 4.0
LEARNING_RATE = 1e-4
EMA_DECAY = 0.9999


def main(argv: list[str] | None = None):
    """Prints both sides' seconds a step (or a batch of samples), and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="S/2", help="a name of configs/dit_imagenet.py, such as B/2 or S/2-512")
    parser.add_argument("--what", default="train", choices=("train", "sample"))
    parser.add_argument("--batch_size", type=int, default=8, help="images a training step, or drawn at once")
    parser.add_argument("--windows", type=int, default=7, help="pairs of windows")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a window, at the least one step")
    parser.add_argument("--attention", default="fused", choices=("fused", "plain"), help="PyTorch's")
    parser.add_argument("--adamw", default="default", choices=("default", "foreach", "fused"), help="PyTorch's")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's; JAX has one a core")
    argv, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv, argparse.Namespace(overrides=overrides))
    theirs = Side(torch_side, args)
    os.environ.setdefault("GLIBC_TUNABLES", f"{HUGE_PAGES}=1")  # as the program has it
    with theirs, Side(jax_side, args) as ours:
        sides = {"torch": theirs, "jax": ours}
        counts = {name: max(1, round(args.seconds / side.seconds(2))) for name, side in sides.items()}
        pairs = []
        for _ in range(args.windows):
            pairs.append({name: side.seconds(counts[name]) for name, side in sides.items()})
    for name in sides:
        times = [pair[name] for pair in pairs]
        print(f"{name:<6} {1e3 * min(times):.1f} ms at best, {1e3 * statistics.median(times):.1f} ms the median")
    ratios = [pair["torch"] / pair["jax"] for pair in pairs]
    print(
        f"DiT-{args.size} {args.what}, batch {args.batch_size}, PyTorch with {args.attention} attention and "
        f"{args.adamw} AdamW: JAX is {statistics.median(ratios):.2f} x as fast ({min(ratios):.2f} to {max(ratios):.2f})"
    )


class Side:
    """A process that repeats its work when asked, and says how long that took; where it fails, this one ends, too."""

    def __init__(self, make_repeat, args):
        self._name = make_repeat.__name__
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(make_repeat, args, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()  # it has compiled and warmed up

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._pipe.close()
        self._process.join()

    def seconds(self, count):
        """Returns the seconds that one repetition took, over `count` of them."""
        self._pipe.send(count)
        return self._receive() / count

    def _receive(self):
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):  # it was killed
            self._process.join()
            answer = ""
        if not isinstance(answer, str):
            return answer
        self._process.join()
        raise child_error(self._name, self._process.exitcode, answer)


def serve(make_repeat, args, pipe):
    """Times repetitions until the other end of the pipe is closed; sends what went wrong, as text."""
    try:
        repeat = make_repeat(args)
        repeat(2)
        pipe.send(0.0)
        while True:
            try:
                count = pipe.recv()
            except EOFError:
                return
            repeat(1)  # during the other's window a hypervisor may have taken the memory that was free
            start = time.perf_counter()
            repeat(count)
            pipe.send(time.perf_counter() - start)
    except Exception:
        pipe.send(traceback.format_exc())
        sys.exit(1)


def config_of(args) -> Config:
    """Returns the config that both sides measure."""
    batch_size = ("training.global_batch_size", str(args.batch_size))
    return load_config(f"configs/dit_imagenet.py:{args.size}", [batch_size, *args.overrides])


def jax_side(args):
    """Returns repeat(count) of the program's own step or sampler."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dit_jax.cli.plan import abstract_batch
    from dit_jax.evaluation.generate import make_draw
    from dit_jax.models.build import init_params
    from dit_jax.parallel.mesh import make_mesh, put_batch
    from dit_jax.training.diffusion_step import make_diffusion_loss
    from dit_jax.training.loop import build_update
    from dit_jax.training.state import create_state
    from dit_jax.training.step import gradients_of, jit_train_step

    config = config_of(args)
    mesh, rng = make_mesh(config.mesh), np.random.default_rng(0)

    if args.what == "sample":
        sampling = dataclasses.replace(
            config.sampling,
            sampler="ddim",
            num_steps=NUM_SAMPLING_STEPS,
            cfg_scale=CFG_SCALE,
            batch_size=args.batch_size,
        )
        draw, _ = make_draw(config, sampling, mesh)
        params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
        indices = jnp.arange(args.batch_size)

        def repeat(count):
            for seed in range(count):
                draw(params, None, seed, indices, {"label": indices}).block_until_ready()

        return repeat

    optimizer, train_step = build_update(config, gradients_of(make_diffusion_loss(config)), None)
    state = create_state(config, optimizer, mesh)
    step_fn = jit_train_step(train_step, state)
    shapes = abstract_batch(config, mesh)
    batch = {"moments": rng.normal(size=shapes["moments"].shape).astype(np.float32)}
    batch = put_batch(batch | {"label": np.arange(args.batch_size, dtype=np.int32)}, mesh, args.batch_size)

    def repeat(count):
        nonlocal state
        for _ in range(count):
            state, metrics = step_fn(state, batch, None)
        jax.block_until_ready(state)

    return repeat


def torch_side(args):
    """Returns repeat(count) of PyTorch's training step or sampling loop."""
    import copy

    import torch

    from tests.pretrained.torch_dit import Attention, TorchDiT

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = config_of(args)
    height, _, channels = config.latents.shape
    Attention.fused = args.attention == "fused"
    model = TorchDiT(
        config.dit.depth, config.dit.width, config.dit.num_heads, config.dit.patch_size, 1000, height, channels
    )
    process, labels = TorchProcess(), torch.arange(args.batch_size)

    if args.what == "sample":
        model.requires_grad_(False)

        def repeat(count):
            for _ in range(count):
                process.draw(model, torch.randn(args.batch_size, channels, height, height), labels)

        return repeat

    average = copy.deepcopy(model).requires_grad_(False)
    implementation = {} if args.adamw == "default" else {args.adamw: True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0, **implementation)
    moments = torch.randn(args.batch_size, 2 * channels, height, height)

    def repeat(count):
        for _ in range(count):
            mean, log_variance = moments.chunk(2, dim=1)
            log_variance = log_variance.clamp(-30, 20)
            x_0 = 0.18215 * (mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean))
            dropped = torch.where(torch.rand(len(labels)) < 0.1, 1000, labels)
            loss = process.loss(model, x_0, dropped)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                parameters = dict(model.named_parameters())
                for name, value in average.named_parameters():
                    value.mul_(EMA_DECAY).add_(parameters[name].data, alpha=1 - EMA_DECAY)

    return repeat


class TorchProcess:
    """DDPM's linear schedule, the hybrid loss of learned variances, and guided DDIM, in PyTorch."""

    def __init__(self):
        import numpy as np
        import torch

        self.torch = torch
        self.betas = np.linspace(1e-4, 0.02, 1000)
        self.alphas_cumprod = np.cumprod(1 - self.betas)
        previous = np.append(1.0, self.alphas_cumprod[:-1])
        variance = self.betas * (1 - previous) / (1 - self.alphas_cumprod)
        self.log_variance = np.log(np.append(variance[1], variance[1:]))
        self.log_betas = np.log(self.betas)
        self.coef_x_0 = self.betas * np.sqrt(previous) / (1 - self.alphas_cumprod)
        self.coef_x_t = (1 - previous) * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod)

    def at(self, table, t):
        """Returns a table at t, as the released code reads it."""
        return self.torch.from_numpy(table)[t].float()[:, None, None, None]

    def loss(self, model, x_0, labels):
        """Returns the squared error of epsilon plus the bound of the variance."""
        torch, noise = self.torch, self.torch.randn_like(x_0)
        t = torch.randint(0, 1000, (len(x_0),))
        alphas = self.alphas_cumprod
        x_t = self.at(alphas**0.5, t) * x_0 + self.at((1 - alphas) ** 0.5, t) * noise
        epsilon, v = model(x_t, t, labels).chunk(2, dim=1)
        bound = self.bound(epsilon.detach(), v, x_0, x_t, t)
        return (((noise - epsilon) ** 2).mean(dim=(1, 2, 3)) + bound).mean()

    def bound(self, epsilon, v, x_0, x_t, t):
        """Returns the bound's term of each image, in bits per dimension."""
        torch, alphas = self.torch, self.alphas_cumprod
        fraction = (v + 1) / 2
        log_variance = fraction * self.at(self.log_betas, t) + (1 - fraction) * self.at(self.log_variance, t)
        predicted = self.at(alphas**-0.5, t) * x_t - self.at((1 / alphas - 1) ** 0.5, t) * epsilon
        mean = self.at(self.coef_x_0, t) * predicted + self.at(self.coef_x_t, t) * x_t
        true_mean = self.at(self.coef_x_0, t) * x_0 + self.at(self.coef_x_t, t) * x_t
        true = self.at(self.log_variance, t)
        distance = (true_mean - mean) ** 2 * torch.exp(-log_variance)
        kl = 0.5 * (-1 + log_variance - true + torch.exp(true - log_variance) + distance)
        cdf = lambda x: 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))  # noqa: E731
        inverse_std = torch.exp(-0.5 * log_variance)
        upper, lower = cdf(inverse_std * (x_0 - mean + 1 / 255)), cdf(inverse_std * (x_0 - mean - 1 / 255))
        inside = torch.where(x_0 > 0.999, 1 - lower, upper - lower)
        nll = -torch.log(torch.where(x_0 < -0.999, upper, inside).clamp(min=1e-12))
        return torch.where(t == 0, nll.mean(dim=(1, 2, 3)), kl.mean(dim=(1, 2, 3))) / 0.6931471805599453

    def draw(self, model, x, labels):
        """Returns images drawn from noise x by guided DDIM."""
        import numpy as np

        torch = self.torch
        with torch.no_grad():
            timesteps = np.linspace(0, 999, NUM_SAMPLING_STEPS).round().astype(int)
            alphas, both = self.alphas_cumprod[timesteps], torch.cat([labels, torch.full_like(labels, 1000)])
            for i in reversed(range(NUM_SAMPLING_STEPS)):
                output = model(torch.cat([x, x]), torch.full((2 * len(x),), int(timesteps[i])), both)
                conditional, unconditional = output[:, :3].chunk(2)
                guided = unconditional + CFG_SCALE * (conditional - unconditional)
                epsilon = torch.cat([guided, output[: len(x), 3:4]], dim=1)
                x_0 = (x - (1 - alphas[i]) ** 0.5 * epsilon) / alphas[i] ** 0.5
                previous = alphas[i - 1] if i else 1.0
                x = previous**0.5 * x_0 + (1 - previous) ** 0.5 * epsilon
        return x


if __name__ == "__main__":
    main()
