"""The trainer's whole pass against PyTorch's autograd: prediction, loss and every gradient.

    dsv-train crosscheck --to pass.safetensors --preset tiny                             # on the CPU, f32
    dsv-train crosscheck --to pass.safetensors --preset tiny --set device.kind=cuda ...  # on a GPU, bf16
    python3 runtime/train/tests/crosscheck.py pass.safetensors

Needs torch and safetensors. The model is written here from its description (model.rs heads with it), in f64, on the
weights and inputs of the file; lists become masks. An error is |ours - torch| over |torch|, both as L2 norms of a tensor.
"""

import argparse
import math
import sys

import torch
from safetensors import safe_open


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(x, eps):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)


def rms_norm_rope(x, weight, cos, sin, eps):
    """x [B, S, H, D]; the two halves of a head are rotated against each other."""
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    low, high = x.chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def attention(q, k, v, mask=None):
    """[B, S, H, D] each; mask [B, H, Sq, Skv], True where a key is attended to. Without any the output is zero."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    p = torch.nan_to_num(torch.softmax(scores, dim=-1))
    return torch.einsum("bhqk,bkhd->bqhd", p, v).flatten(2)


def mask_of(index, count, tokens, query_group, kv_block):
    batch, heads, groups, width = index.shape
    listed = torch.arange(width) < count[..., None]
    blocks = torch.zeros(batch, heads, groups, -(-tokens // kv_block) + 1, dtype=torch.bool)
    # Entries past the count go to a column that is cut off.
    blocks.scatter_(3, torch.where(listed, index, blocks.shape[3] - 1).long(), True)
    keys = blocks[..., :-1].repeat_interleave(kv_block, dim=3)[..., :tokens]
    return keys.repeat_interleave(query_group, dim=2)[:, :, :tokens]


def forward(w, inputs, lists, size):
    heads, dim_of_head, eps = size["heads"], size["head_dim"], size["eps"]
    x, t, text, drop = (inputs[key] for key in ("x_t", "t", "text", "drop"))
    batch, tokens, _ = x.shape
    split = lambda x: x.unflatten(-1, (-1, heads, dim_of_head))

    half = w["time.in.weight"].shape[1] // 2
    angle = 1000.0 * t[:, None] * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    silu, gelu = torch.nn.functional.silu, lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    time = linear(w, "time.out", silu(linear(w, "time.in", torch.cat([angle.cos(), angle.sin()], -1))))
    shared = linear(w, "adaln", silu(time)).view(batch, 6, -1)
    final = linear(w, "final.mod", silu(time)).view(batch, 2, -1)
    text = torch.where(drop[:, None, None] != 0, w["text.null"], text)
    y = linear(w, "text.out", gelu(linear(w, "text.in", text)))

    x = linear(w, "patch", x)
    for layer in range(size["layers"]):
        name = f"block.{layer}"
        shift1, scale1, gate1, shift2, scale2, gate2 = (shared + w[f"{name}.table"]).unsqueeze(2).unbind(1)
        n = layer_norm(x, eps) * (1 + scale1) + shift1
        q, k, v = split(linear(w, f"{name}.qkv", n)).unbind(2)
        q = rms_norm_rope(q, w[f"{name}.q_norm"], inputs["cos"], inputs["sin"], eps)
        k = rms_norm_rope(k, w[f"{name}.k_norm"], inputs["cos"], inputs["sin"], eps)
        x = x + gate1 * linear(w, f"{name}.o", attention(q, k, v, lists.get(layer)))
        k, v = split(linear(w, f"{name}.cross.kv", y)).unbind(2)
        q = split(linear(w, f"{name}.cross.q", x)).squeeze(2)
        x = x + linear(w, f"{name}.cross.o", attention(q, k, v))
        up = linear(w, f"{name}.up", layer_norm(x, eps) * (1 + scale2) + shift2)
        if size["geglu"]:
            value, gate = up.chunk(2, dim=-1)
            up = value * gelu(gate)
        else:
            up = gelu(up)
        x = x + gate2 * linear(w, f"{name}.down", up)
    shift, scale = final.unsqueeze(2).unbind(1)
    return linear(w, "final.head", layer_norm(x, eps) * (1 + scale) + shift)


def main():
    parser = argparse.ArgumentParser(description="Compare a pass of dsv-train crosscheck with PyTorch")
    parser.add_argument("file")
    parser.add_argument("--tolerance", type=float, help="largest error of a tensor [1e-4 for f32, 0.05 for bf16]")
    args = parser.parse_args()

    tensors = {}
    with safe_open(args.file, "pt") as f:
        meta = f.metadata()
        for name in f.keys():
            tensors[name] = f.get_tensor(name)
    size = {key: int(value) for key, value in meta.items() if value.isdigit()}
    size["eps"] = float(meta["eps"])
    part = lambda prefix: {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    real = lambda x: x.double() if x.is_floating_point() else x
    w = {name: real(x).requires_grad_() for name, x in part("weight.").items()}
    inputs = {name: real(x) for name, x in part("input.").items()}
    lists = {}
    for layer in range(size["layers"]):
        if f"lists.{layer}.index" in tensors:
            index, count = tensors[f"lists.{layer}.index"], tensors[f"lists.{layer}.count"]
            tokens = inputs["x_t"].shape[1]
            lists[layer] = mask_of(index, count, tokens, size["query_group"], size["kv_block"])

    pred = forward(w, inputs, lists, size)
    loss = (pred - inputs["target"]).square().mean(dim=(1, 2))
    loss.mean().backward()

    tolerance = args.tolerance or (0.05 if "bf16" in meta["engine"] else 1e-4)
    pairs = [("pred", tensors["output.pred"], pred), ("loss", tensors["output.loss"], loss)]
    pairs += [(f"gradient of {name}", tensors[f"grad.{name}"], x.grad) for name, x in w.items()]
    worst = 0.0
    for name, ours, theirs in pairs:
        error = ((real(ours) - theirs).norm() / theirs.norm()).item()
        worst = max(worst, error) if error == error else math.inf
        if not error <= tolerance:
            print(f"WRONG  {name}: error {error:.2e}, allowed {tolerance:.0e}")
    blocks = f"{size['layers']} blocks, {len(lists)} over lists"
    print(f"{meta['engine']}: {blocks}, {len(pairs)} tensors, largest error {worst:.2e}, allowed {tolerance:.0e}")
    sys.exit(not worst <= tolerance)


if __name__ == "__main__":
    main()
