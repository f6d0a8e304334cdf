"""Numbers of torch (2.13.0, CPU) that `tests/layers/test_images.py` compares with: python torch_images.py, in place.

Names say what was called; inputs come from `numpy.random.default_rng(0)` in the order below.
"""

from pathlib import Path

import numpy as np

rng = np.random.default_rng(0)
INPUTS = {
    "line": rng.normal(size=(1, 2, 7)),
    "image": rng.normal(size=(2, 2, 5, 7)),
    "volume": rng.normal(size=(1, 1, 3, 4, 5)),
    "grid2": rng.uniform(-1.6, 1.6, size=(2, 3, 4, 2)),
    "grid3": rng.uniform(-1.6, 1.6, size=(1, 2, 2, 3, 3)),
}
MODES = {1: ("nearest", "nearest-exact", "linear", "area"), 2: ("bilinear", "bicubic", "nearest"), 3: ("trilinear",)}


def resize_cases():
    """(name, input, arguments of F.interpolate)"""
    sizes = {"line": [(12,), (3,), (7,), (1,)], "image": [(8, 4), (3, 11)], "volume": [(5, 2, 9)]}
    for axes, name in enumerate(sizes, start=1):
        for mode in MODES[axes]:
            for size in sizes[name]:
                for align in (False, True) if "linear" in mode or mode == "bicubic" else (None,):
                    yield name, dict(size=size, mode=mode, align_corners=align)
    for mode in ("bilinear", "bicubic"):
        for size in ((3, 4), (8, 10), (2, 12)):
            yield "image", dict(size=size, mode=mode, align_corners=False, antialias=True)
    yield "image", dict(size=(3, 4), mode="bilinear", align_corners=True, antialias=True)
    for mode in ("nearest", "nearest-exact", "bilinear", "bicubic", "area"):
        for recompute in (False, True):
            yield "image", dict(scale_factor=(1.7, 0.55), mode=mode, recompute_scale_factor=recompute)


def grid_cases():
    for align in (False, True):
        for padding in ("zeros", "border", "reflection"):
            for mode in ("bilinear", "nearest", "bicubic"):
                yield "image", "grid2", dict(mode=mode, padding_mode=padding, align_corners=align)
            for mode in ("bilinear", "nearest"):
                yield "volume", "grid3", dict(mode=mode, padding_mode=padding, align_corners=align)


def main():
    import torch
    import torch.nn.functional as F

    def gradients(y, *inputs):
        weights = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape)
        return [g.numpy() for g in torch.autograd.grad((y * weights).sum(), inputs)]

    tensors = {k: torch.tensor(v, requires_grad=True) for k, v in INPUTS.items()}
    stored = {}
    for i, (name, options) in enumerate(resize_cases()):
        # Torch picks nearest indices in float32 only for float32.
        x = tensors[name].float() if "nearest" in options["mode"] else tensors[name]
        y = F.interpolate(x, **options)
        stored[f"resize{i}"] = y.detach().numpy()
    for i, (name, grid, options) in enumerate(grid_cases()):
        y = F.grid_sample(tensors[name], tensors[grid], **options)
        stored[f"grid{i}"] = y.detach().numpy()
        if options["mode"] != "nearest" and i % 3 == 0:
            stored[f"grid{i}_dx"], stored[f"grid{i}_dgrid"] = gradients(y, tensors[name], tensors[grid])
    image = tensors["image"].detach()
    stored["unfold"] = F.unfold(image, (2, 3), dilation=(1, 2), padding=(1, 2), stride=(2, 1)).numpy()
    stored["fold"] = F.fold(
        torch.tensor(stored["unfold"]), (5, 7), (2, 3), dilation=(1, 2), padding=(1, 2), stride=(2, 1)
    ).numpy()
    stored["adaptive_avg"] = F.adaptive_avg_pool2d(image, (3, 5)).numpy()
    stored["adaptive_max"] = F.adaptive_max_pool2d(image, (3, 5)).numpy()
    for count in (False, True):
        stored[f"avg_pool_{count}"] = F.avg_pool2d(image, 3, 2, 1, count_include_pad=count).numpy()
    stored["max_pool"] = F.max_pool2d(image, 3, 2, 1).numpy()
    stored["pixel_shuffle"] = F.pixel_shuffle(torch.arange(48.0).reshape(1, 12, 2, 2), 2).numpy()
    stored = {k: v.astype(np.float32) for k, v in stored.items()}
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
