"""Measures samples against a reference, or how an autoencoder reconstructs; each result has its protocol with it.

Of a run of super-resolution or inpainting: PSNR, SSIM and LPIPS of held-out images restored, beside the simplest way.
Of another diffusion run, or of a file of samples: Frechet distance (FID where the features are Inception's), sFID, KID,
inception score, precision, recall, and the share of samples that a classifier recognises. Of a run with captions, by
--metrics=retrieval: where a small image-text model, trained on real pairs, ranks the right one of all held-out captions
for each picture drawn. Of an autoencoder: PSNR, SSIM, LPIPS and use of the codebook. Two results compare with --compare
A.json B.json, if their protocols are the same.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib

from dit_jax.cli.main import path_flag
from dit_jax.config import (
    AutoencoderConfig,
    ComputeConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    TextConfig,
    check_config,
    check_seed,
    did_you_mean,
    override_config,
    override_data,
)
from dit_jax.files import to_json, write_text_whole
from dit_jax.terminal import progress

HELP = "measures samples, a diffusion model or an autoencoder, with the protocol"
NUM_PICTURES = 50  # images in an autoencoder's grid
NUM_SAMPLES = 10_000
BATCH_SIZE = 64  # of an autoencoder
FROM_FILE = tuple(f"data.{name}" for name in ("name", "image_size", "channels", "num_classes"))  # with --samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    what = parser.add_argument_group("what is measured (one of them)")
    what.add_argument(
        "--workdir", type=path_flag, metavar="DIR", help="of a diffusion or autoencoder run, or converted"
    )
    what.add_argument(
        "--samples",
        type=path_flag,
        metavar="PATH",
        help="images: an .npz as `dit-jax sample` and ADM write them, an .npy, or a folder of pictures",
    )
    what.add_argument(
        "--compare", type=path_flag, nargs=2, metavar="FILE.json", help="two results, if their protocols are the same"
    )
    parser.add_argument(
        "--output",
        type=path_flag,
        metavar="DIR",
        help="where results go (default: evaluation/ in the workdir or, of a file, here)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="put the result in the place of one of other settings that is there"
    )
    parser.add_argument("--metrics", metavar="M[,M...]", help="default: all that there can be")
    parser.add_argument("--num_samples", type=int, help=f"default: {NUM_SAMPLES:,} drawn, or all that there are")
    parser.add_argument("--batch_size", type=int, help="images that a device takes at once (default: the run's)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    against = parser.add_argument_group("against what")
    against.add_argument(
        "--reference", type=path_flag, metavar="R", help="FILE.npz, a folder, or TFDS_NAME[:SPLIT] (default: the run's)"
    )
    against.add_argument(
        "--features",
        type=path_flag,
        help="classifier (trained now on the run's data set; with --samples, on the reference's), inception, resnet50, "
        "dinov2, or a converted network's file (default: the second or third, where weights/ has it, else the first)",
    )
    against.add_argument(
        "--cache", default=EvaluationConfig.cache, metavar="DIR", help="of statistics (default: %(default)s)"
    )
    against.add_argument(
        "--text_encoder",
        type=path_flag,
        default=TextConfig.path,
        metavar="DIR",
        help="of the model that ranks captions, with --metrics=retrieval (default: %(default)s)",
    )
    against.add_argument(
        "--lpips", type=path_flag, metavar="FILE", help="LPIPS' weights (default: the autoencoder run's config)"
    )
    how = parser.add_argument_group("how a diffusion model draws", "flags as those of `dit-jax sample`")
    how.add_argument("--labels", default="balanced", help="balanced (in turn) or random (default: %(default)s)")
    how.add_argument("--sampler", help="default: the run's config.sampling, as for the next three")
    how.add_argument("--steps")
    how.add_argument("--cfg_scale")
    how.add_argument("--eta")
    how.add_argument("--seed", type=int, default=0, help="of the noise, and of random labels (default: %(default)s)")
    how.add_argument("--average", help="another average of the weights that the run kept, such as decay_0.999")
    how.add_argument("--ema_length", type=float, help="of an average made now from the run's snapshots, such as 0.1")
    sweep = parser.add_argument_group("a sweep", "every combination, with a table and charts; goes on where it stopped")
    for name in ("sampler", "steps", "cfg_scale", "ema_length"):
        sweep.add_argument(f"--sweep.{name}", metavar="V,V...", dest=f"sweep_{name}")
    parser.add_argument("--varied", default="", metavar="KEY[,KEY...]", help="with --compare: keys that may differ")
    parser.set_defaults(overridable=("data.", "sampling."))
    parser.epilog = "Any other key of config.data and config.sampling is set with --config.KEY=VALUE."


def run(args: argparse.Namespace) -> None:
    """Measures, then writes and prints the results."""
    for name in ("num_samples", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}={value} must be positive")
    given = [name for name in ("workdir", "samples", "compare") if getattr(args, name) is not None]
    if len(given) != 1:
        raise ValueError(f"give one of --workdir, --samples and --compare, not {' and '.join(given) or 'none'}")
    if args.compare:
        compare(*args.compare, [key for key in args.varied.split(",") if key], args.json)
        return
    from dit_jax.evaluation.networks import default_features
    from dit_jax.parallel.distributed import start_processes

    start_processes()
    args.features = args.features or default_features()
    if args.samples:
        evaluate_samples(args)
        return
    from dit_jax.checkpoint import find_checkpoint
    from dit_jax.parallel.compilation_cache import use_compilation_cache

    step, config = find_checkpoint(args.workdir)
    if config.stage == "classifier":
        raise ValueError(f"--workdir={args.workdir} is a classifier's run; its held-out accuracy is in its metrics")
    config = override_config(config, args.overrides)
    use_compilation_cache(ComputeConfig().compilation_cache)  # its programs are run: no folder that a workdir names
    restores = config.spatial is not None and config.spatial.kind != "semantic"
    evaluate_stage = evaluate_restoration if restores else evaluate_diffusion
    evaluate_stage = evaluate_retrieval if args.metrics == "retrieval" else evaluate_stage
    evaluate_stage = evaluate_autoencoder if config.stage == "autoencoder" else evaluate_stage
    evaluate_stage(args, step, config)


def compare(one: str, other: str, varied: list[str], as_json: bool) -> None:
    """Prints both results' figures; raises ValueError where their protocols differ, with all that does."""
    from dit_jax.evaluation.protocol import differences, figure_label, read_card

    cards = read_card(one), read_card(other)
    found = differences(*cards, varied)
    if found:
        raise ValueError(
            f"{one} and {other} do not compare, their protocols differ in {'; '.join(found)}; measure again by one "
            "protocol, or name what is meant to differ with --varied"
        )
    values = {name: [card["values"].get(name) for card in cards] for name in cards[0]["values"] | cards[1]["values"]}
    if as_json:
        print(json.dumps({"values": values, "varied": varied}))
        return
    rows = [["", one, other]]
    for name, pair in values.items():
        rows.append([figure_label(name, cards[0]), *("-" if x is None else f"{x:.4g}" for x in pair)])
    print_table(rows)


def evaluate_samples(args: argparse.Namespace) -> None:
    """Measures the images of a file or a folder."""
    for key, _ in args.overrides:
        if key.partition(".")[0] != "data" or key in FROM_FILE:
            raise ValueError(f"--config.{key} cannot be set for --samples: they are drawn already; leave it out")
    if args.reference is None:
        raise ValueError("--samples needs a --reference: FILE.npz, a folder, or TFDS_NAME[:SPLIT]")
    from dit_jax.data.sources import tfds_classes
    from dit_jax.evaluation.evaluated import evaluate_file, file_settings
    from dit_jax.evaluation.protocol import refuse_other
    from dit_jax.evaluation.reference import reference_data
    from dit_jax.evaluation.samples import open_samples
    from dit_jax.metrics.adm_files import is_array_file

    file = open_samples(args.samples)
    data = override_data(DataConfig(name="", image_size=file.shape[1]), args.overrides)
    if not (is_array_file(args.reference) or os.path.isdir(args.reference)):
        data, _ = reference_data(args.reference, data)
        data = dataclasses.replace(data, channels=tfds_classes(data)[1])
    elif args.features == "classifier":
        raise ValueError(
            f"--features=classifier is trained on a data set, and --reference={args.reference} is none; "
            "give a TFDS name"
        )
    evaluator, asked = evaluator_of(args, data), asked_metrics(args)
    output = pathlib.Path(args.output or "evaluation")
    path = output / "evaluation.json"
    if path.exists() and not args.overwrite:
        refuse_other(path, file_settings(file, args.num_samples, evaluator, asked), args.overwrite)
    finish(args, evaluate_file(file, args.num_samples, evaluator, asked), output)


def evaluate_diffusion(args: argparse.Namespace, step: int, config: Config) -> None:
    """Measures the images that a diffusion model draws, once or over a sweep."""
    from dit_jax.evaluation.evaluated import checkpoint_protocol, checkpoint_subject, evaluate_checkpoint
    from dit_jax.evaluation.loaded import load
    from dit_jax.evaluation.protocol import refuse_other, software
    from dit_jax.evaluation.sweep import AXES, grid, run_sweep

    points = grid({name: sweep_values(name, getattr(args, f"sweep_{name}")) for name in AXES})
    # What is wrong with one of them is said before the first is measured.
    settings = [sample_settings(args, config, point) for point in points]
    evaluator, asked = evaluator_of(args, config.data), asked_metrics(args)
    metrics, _ = evaluator.choose(asked, settings[0].num_samples, has_labels=True)

    @functools.lru_cache(maxsize=1)  # one in memory at a time
    def model(ema_length: float | None):
        return load(args.workdir, step, average=args.average, ema_length=ema_length)

    def described(point: dict) -> tuple:
        length, decay = point.get("ema_length", args.ema_length), config.training.ema_decay
        average = args.average or (None if decay is None else f"decay_{decay}")
        return model(length), average if length is None else f"length_{length}", sample_settings(args, config, point)

    def expected(point: dict) -> tuple[dict, dict]:
        protocol = checkpoint_protocol(*described(point)) | evaluator.protocol(metrics)
        return checkpoint_subject(described(point)[0]), protocol

    output = pathlib.Path(args.output or pathlib.Path(args.workdir) / "evaluation")

    def evaluate(point: dict) -> dict:
        return evaluate_checkpoint(*described(point), evaluator, asked, output)

    if points == [{}]:
        subject, protocol = expected({})
        refuse_other(output / "evaluation.json", subject | protocol | {"software": software()}, args.overwrite)
        finish(args, evaluate({}), output)
    else:
        finish_sweep(args, points, run_sweep(points, output / "sweep", expected, evaluate, args.overwrite), output)


def evaluate_restoration(args: argparse.Namespace, step: int, config: Config) -> None:
    """Measures super-resolution or inpainting of held-out images; writes `restoration.json` and a picture."""
    lpips_path = args.lpips or AutoencoderConfig.lpips_path
    settings = sample_settings(args, config, {})

    from dit_jax.data.pipeline import image_transform, spatial_arrays
    from dit_jax.data.sources import open_source, source_identity
    from dit_jax.evaluation.drawing import write_picture
    from dit_jax.evaluation.evaluated import checkpoint_protocol, checkpoint_subject
    from dit_jax.evaluation.loaded import load
    from dit_jax.evaluation.pictures import condition_grid
    from dit_jax.evaluation.protocol import refuse_other
    from dit_jax.evaluation.reconstruction import available_metrics
    from dit_jax.evaluation.restoration import RESTORED, measure_restorations, restore
    from dit_jax.perceptual.lpips import load_lpips

    has_lpips = bool(args.lpips) or os.path.isfile(lpips_path)
    obstacle = available_metrics(None, config.data.image_size, has_lpips)["lpips"]
    lpips_params = load_lpips(lpips_path) if obstacle is None else None
    source = open_source(config.data, config.data.eval_split)
    transform = image_transform(config.data, train=False, conditions=spatial_arrays(config.data, config.spatial))
    settings = dataclasses.replace(settings, num_samples=min(settings.num_samples, len(source)))
    model = load(args.workdir, step, average=args.average, ema_length=args.ema_length)
    output = pathlib.Path(args.output or pathlib.Path(args.workdir) / "evaluation")
    about = {"data": source_identity(config.data), "split": config.data.eval_split}
    about |= {"spatial": dataclasses.asdict(config.spatial), "lpips_measured": obstacle is None}
    about |= checkpoint_subject(model)
    about |= checkpoint_protocol(model, args.average, settings)
    refuse_other(output / "restoration.json", about, args.overwrite)
    output.mkdir(parents=True, exist_ok=True)
    found = restore(model, settings.sampling, settings.seed, source, transform, settings.num_samples, output)
    values = measure_restorations(config, found, lpips_params)
    results = values | about
    grid = condition_grid(config, [found.drawn[:NUM_PICTURES], found.baseline[:NUM_PICTURES]], found.examples)
    write_picture(output / "restorations.png", grid)
    write_text_whole(output / "restoration.json", to_json(results))
    if args.json:
        print(json.dumps(results))
        return
    print(f"{len(found.images):,} held-out images of {config.data.name}, checkpoint of step {step}")
    baseline = RESTORED[config.spatial.kind]
    rows = [["", "drawn", baseline]]
    for name in ("psnr", "ssim", "lpips"):
        if name in values:
            rows.append([LABELS[name], f"{values[name]:.4g}", f"{values[f'{baseline}_{name}']:.4g}"])
    print_table(rows)
    if "known_pixels_exact" in values:
        print(f"known pixels are {'exact' if values['known_pixels_exact'] else 'NOT exact'}")
    if obstacle is not None:
        print(f"LPIPS is not measured: {obstacle}")
    print(
        f"written: {output / 'restoration.json'}, {output / 'restorations.png'} (rows: given, drawn, {baseline}, true)"
    )


def evaluate_retrieval(args: argparse.Namespace, step: int, config: Config) -> None:
    """Measures whether pictures drawn for held-out captions are told by them; writes `retrieval.json` and a picture."""
    text = config.conditions and config.conditions.text
    if not text:
        raise ValueError(
            f"--metrics=retrieval needs a run with captions (config.conditions.text); {args.workdir} has none"
        )
    settings = sample_settings(args, config, {})

    import numpy as np

    from dit_jax.data.sources import source_identity
    from dit_jax.evaluation.drawing import Drawing, write_picture
    from dit_jax.evaluation.evaluated import checkpoint_protocol, checkpoint_subject
    from dit_jax.evaluation.loaded import load
    from dit_jax.evaluation.parts import Parts
    from dit_jax.evaluation.pictures import comparison_grid
    from dit_jax.evaluation.protocol import refuse_other
    from dit_jax.evaluation.trained_retrieval import RECIPE, trained_retrieval
    from dit_jax.metrics.retrieval import num_top
    from dit_jax.parallel.distributed import is_first

    judge = trained_retrieval(
        config.example_data, text.caption_field, args.text_encoder, args.cache, settings.num_samples
    )
    model = load(args.workdir, step, average=args.average, ema_length=args.ema_length)
    conditions = {"label": judge.labels, "text": model.captions.condition(judge.captions)}
    settings = dataclasses.replace(settings, num_samples=len(judge.captions))
    output = pathlib.Path(args.output or pathlib.Path(args.workdir) / "evaluation")
    about = {"captions": len(judge.captions), "data": source_identity(config.data), "split": config.data.eval_split}
    about |= {"image_text_model": RECIPE} | checkpoint_subject(model)
    about |= checkpoint_protocol(model, args.average, settings)
    refuse_other(output / "retrieval.json", about, args.overwrite)
    output.mkdir(parents=True, exist_ok=True)
    drawing = Drawing(model, conditions, settings.sampling, settings.seed)
    with Parts(output, drawing.identity()) as parts:
        drawn = np.concatenate(list(drawing.draw(parts, progress=True)))
        parts.remove()
    if not is_first():
        return
    chance = {"median_rank": 0.5, "top_tenth": num_top(len(drawn)) / len(drawn)}
    values = {"drawn": judge.measure(drawn), "real": judge.figures, "chance": chance}
    results = values | about
    shown = np.linspace(0, len(drawn) - 1, min(len(drawn), NUM_PICTURES)).round().astype(int)
    write_picture(output / "retrieval.png", comparison_grid([drawn[shown], judge.images[shown]]))
    write_text_whole(output / "retrieval.json", to_json(results))
    if args.json:
        print(json.dumps(results))
        return
    print(f"{len(drawn):,} held-out captions of {config.data.name}, checkpoint of step {step}: where each picture's is")
    rows = [["", *values]]
    rows += [[label, *(f"{each[name]:.1%}" for each in values.values())] for name, label in RANKS.items()]
    print_table(rows)
    print(f"written: {output / 'retrieval.json'}, {output / 'retrieval.png'} (rows: drawn, real)")


RANKS = {"median_rank": "captions above it (median)", "top_tenth": "among the first tenth"}


def sample_settings(args: argparse.Namespace, config: Config, point: dict):
    """Returns how images are drawn at a point of the sweep: by the run's config, then the flags, then the point."""
    from dit_jax.cli.sample import parse_steps
    from dit_jax.evaluation.evaluated import SampleSettings
    from dit_jax.evaluation.generate import LABEL_PROTOCOLS, override_sampling

    check_seed(args.seed)
    if args.labels not in LABEL_PROTOCOLS:
        raise ValueError(
            f"--labels={args.labels} must be one of {', '.join(LABEL_PROTOCOLS)}"
            f"{did_you_mean(args.labels, LABEL_PROTOCOLS)}"
        )
    flags = {name: point.get(name, getattr(args, name)) for name in ("sampler", "cfg_scale", "eta", "batch_size")}
    overrides = [(f"sampling.{name}", str(value)) for name, value in flags.items() if value is not None]
    steps = str(point["steps"]) if "steps" in point else args.steps
    sampling = override_sampling(override_config(config, overrides).sampling, parse_steps(steps))
    check_config(dataclasses.replace(config, sampling=sampling))
    return SampleSettings(sampling, args.num_samples or NUM_SAMPLES, args.labels, args.seed)


def sweep_values(name: str, text: str | None) -> list:
    """Returns the values of an axis of the sweep."""
    if text is None:
        return []
    kind = {"sampler": str, "steps": int}.get(name, float)
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--sweep.{name}={text} must be numbers with commas between, such as 1,2") from None
    if len(set(values)) < len(values):
        raise ValueError(f"--sweep.{name}={text} has a value twice; leave one out")
    return values


def asked_metrics(args: argparse.Namespace) -> list[str] | None:
    """Returns the metrics of --metrics; None for all."""
    return None if args.metrics is None else args.metrics.split(",")


def evaluator_of(args: argparse.Namespace, data: DataConfig):
    """Returns what measures images of a data set's size against the reference."""
    from dit_jax.config import MeshConfig
    from dit_jax.evaluation.evaluator import make_evaluator
    from dit_jax.parallel.mesh import make_mesh

    return make_evaluator(args.reference, args.features, data, make_mesh(MeshConfig()), args.cache)


def finish(args: argparse.Namespace, card: dict, output: pathlib.Path) -> None:
    """Writes and prints a result, on one process."""
    from dit_jax.evaluation.protocol import table, write_card
    from dit_jax.parallel.distributed import is_first

    if not is_first():
        return
    output.mkdir(parents=True, exist_ok=True)
    write_card(output / "evaluation.json", card)
    if args.json:
        print(json.dumps(card))
        return
    print_table(table(card))
    print(f"written: {output / 'evaluation.json'}")


def finish_sweep(args: argparse.Namespace, points: list[dict], cards: list[dict], output: pathlib.Path) -> None:
    """Draws and prints a sweep, on one process."""
    from dit_jax.evaluation.sweep import table_rows, write_charts
    from dit_jax.parallel.distributed import is_first

    if not is_first():
        return
    charts = write_charts(points, cards, output)
    if args.json:
        print(json.dumps([point | {"card": card} for point, card in zip(points, cards, strict=True)]))
        return
    print_table(table_rows(points, cards))
    print(f"written: {', '.join(map(str, [output / 'sweep', *charts]))}")


def print_table(rows) -> None:
    """Prints rows of text in columns."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def evaluate_autoencoder(args: argparse.Namespace, step: int, config: Config) -> None:
    """Measures an autoencoder's reconstructions; writes `reconstruction.json` and a picture."""
    lpips_path = args.lpips or config.autoencoder.lpips_path
    metrics, left_out = choose_metrics(args.metrics, config, os.path.isfile(lpips_path) or args.lpips is not None)

    import numpy as np

    from dit_jax.checkpoint import params_digest
    from dit_jax.config import MeshConfig
    from dit_jax.data.pipeline import eval_batches, image_transform
    from dit_jax.data.sources import open_source, source_identity
    from dit_jax.evaluation.drawing import write_picture
    from dit_jax.evaluation.loaded import load
    from dit_jax.evaluation.pictures import make_reconstructor, reconstruction_grid
    from dit_jax.evaluation.protocol import refuse_other
    from dit_jax.evaluation.reconstruction import measure_reconstructions, reconstructed
    from dit_jax.parallel.distributed import is_first
    from dit_jax.parallel.mesh import batch_shards, local_rows, make_mesh, prefetch
    from dit_jax.perceptual.lpips import load_lpips

    lpips_params = load_lpips(lpips_path) if "lpips" in metrics else None
    output = pathlib.Path(args.output or pathlib.Path(args.workdir) / "evaluation")
    source, transform = open_source(config.data, config.data.eval_split), image_transform(config.data, train=False)
    model, mesh = load(args.workdir, step), make_mesh(MeshConfig())
    batch_size = -(-(args.batch_size or BATCH_SIZE) // batch_shards(mesh)) * batch_shards(mesh)
    num_images = min(len(source), args.num_samples or len(source))
    num_batches = -(-num_images // batch_size)

    def batches(name: str):
        found = eval_batches(
            source,
            transform,
            batch_size=batch_size,
            rows=local_rows(mesh, batch_size),
            num_examples=args.num_samples,
            num_threads=config.data.num_threads,
        )
        return progress(
            prefetch(found, mesh, batch_size), total=num_batches, unit="batch", description=name, active=is_first()
        )

    module, protocol = model.codec.module, {}
    if "rfd" in metrics:
        args.reference = args.reference or f"{config.data.name}:{config.data.eval_split}"
        evaluator = evaluator_of(args, config.data)
        protocol = evaluator.protocol(["fd"])
    about = {"num_images": num_images, "step": step, "autoencoder": params_digest(model.params)}
    about |= {"data": source_identity(config.data), "split": config.data.eval_split, "left_out": left_out}
    about |= {"measured": metrics} | protocol
    refuse_other(output / "reconstruction.json", about, args.overwrite)
    output.mkdir(parents=True, exist_ok=True)
    values = measure_reconstructions(module, model.params, lpips_params, batches("evaluating: batch"), metrics)
    if "rfd" in metrics:
        images = evaluator.evaluate(reconstructed(module, model.params, batches("reconstructing: batch")), None, ["fd"])
        values |= {f"r{name}": value for name, value in images.values.items()}  # rfid, or rfd_classifier_10k
    count = min(len(source), NUM_PICTURES)
    images = np.stack([transform(source[i], np.random.default_rng(0))["image"] for i in range(count)])
    grid = reconstruction_grid(images, make_reconstructor(config)(model.params, images))
    results = values | {"workdir": str(args.workdir)} | about
    write_picture(output / "reconstructions.png", grid)
    write_text_whole(output / "reconstruction.json", to_json(results))
    if args.json:
        print(json.dumps(results))
        return
    print(f"{values['num_images']:,} held-out images of {config.data.name}, checkpoint of step {step}")
    distances = {name: f"{name}, features of {protocol['features']['name']}" for name in values if name[:2] == "rf"}
    for name, label in (LABELS | distances).items():
        if name in values:
            print(f"  {label:<28} {values[name]:.4g}")
    for name, reason in left_out.items():
        print(f"  {name} is not measured: {reason}")
    print(f"written: {output / 'reconstruction.json'}, {output / 'reconstructions.png'}")


LABELS = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "lpips": "LPIPS (VGG-16, 0.1)",
    "codes_used": "share of codes in use",
    "perplexity": "perplexity of the codes",
}


def choose_metrics(asked: str | None, config, has_lpips: bool) -> tuple[list[str], dict[str, str]]:
    """Returns the metrics to measure, and what is left out with the reason; what was asked for is not left out."""
    from dit_jax.evaluation.reconstruction import METRICS, available_metrics

    codebook = config.autoencoder.codebook
    obstacles = available_metrics(codebook.num_codes if codebook else None, config.data.image_size, has_lpips)
    if asked is None:
        left_out = {name: reason for name, reason in obstacles.items() if reason and name != "codes"}
        return [name for name in METRICS if obstacles[name] is None and name != "rfd"], left_out
    metrics = asked.split(",")
    for name in metrics:
        if name not in METRICS:
            near = did_you_mean(name, METRICS)
            raise ValueError(f"--metrics={asked}: {name!r} must be one of {', '.join(METRICS)}{near}")
        if obstacles[name] is not None:
            raise ValueError(f"--metrics={asked}: {name} cannot be measured: {obstacles[name]}")
    return metrics, {}
