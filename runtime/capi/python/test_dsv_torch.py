"""The binding against attention written in PyTorch, in f64, with its autograd. On a GPU machine with PyTorch:
    python3 runtime/capi/python/test_dsv_torch.py [BUNDLE]
"""

import sys

import torch

from dsv_torch import Dsv, DsvError, Lists


def reference(q, k, v, lists, scale):
    """out and lse of [B, S, H, D] tensors over the listed keys."""
    batch, seqlen_q, heads, columns = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * (scale or columns**-0.5)
    if lists:
        seen = torch.zeros(batch, heads, lists.count.shape[2], -(-k.shape[1] // lists.kv_block), dtype=torch.bool, device=q.device)
        for place in torch.cartesian_prod(*(torch.arange(n) for n in lists.count.shape)).tolist():
            seen[tuple(place)][lists.index[tuple(place)][: lists.count[tuple(place)]].long()] = True
        seen = seen.repeat_interleave(lists.query_group, 2)[:, :, :seqlen_q].repeat_interleave(lists.kv_block, 3)[..., : k.shape[1]]
        logits = logits.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(logits, -1)
    weights = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0).unsqueeze(-1))
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse


def close(name, found, exact, bound):
    error = (found.double() - exact.double()).abs().max().item() / max(exact.double().abs().max().item(), 1e-9)
    assert error < bound, f"{name}: relative error {error:.2g}, allowed {bound}"
    return error


def case(dsv, batch, seqlen_q, seqlen_kv, heads, kv_heads, columns, group, block, kept, deterministic=False, dtype=torch.bfloat16):
    torch.manual_seed(seqlen_q + columns)
    make = lambda s, h, d, grad=True: torch.randn(batch, s, h, d, device="cuda").to(dtype).requires_grad_(grad)
    q, k, v = make(seqlen_q, heads, columns), make(seqlen_kv, kv_heads, columns), make(seqlen_kv, kv_heads, columns)
    lists = None
    if group:
        q_lr, k_lr = (torch.randn(batch, s, heads, 16, device="cuda").bfloat16() for s in (seqlen_q, seqlen_kv))
        lists = dsv.select(q_lr, k_lr, kept, query_group=group, kv_block=block, rule="mean")
        assert (lists.count == kept).all()
    out, lse = dsv.attention(q, k, v, lists, deterministic=deterministic, return_lse=True)
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
    found = torch.autograd.grad([out, lse], [q, k, v], [d_out, d_lse])
    dsv.check()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact_out, exact_lse = reference(*exact, lists, None)
    grads = torch.autograd.grad([exact_out, exact_lse], exact, [d_out.double(), d_lse.double()])
    errors = [close("out", out, exact_out, 0.02), close("lse", lse, exact_lse, 1e-4)]
    errors += [close(name, a, b, 0.03) for name, a, b in zip(("dq", "dk", "dv"), found, grads)]
    if deterministic:
        again = torch.autograd.grad(list(dsv.attention(q, k, v, lists, deterministic=True, return_lse=True)), [q, k, v],
                                    [d_out, d_lse])
        assert all(torch.equal(a, b) for a, b in zip(found, again)), "the same bits every time"
    print(f"[{batch}, {seqlen_q} x {seqlen_kv}, {heads} of {kv_heads}, {columns}] ({group}, {block}), {dtype}: "
          + " ".join(f"{e:.1e}" for e in errors))


def main():
    dsv = Dsv(bundle=sys.argv[1] if len(sys.argv) > 1 else None)
    case(dsv, 2, 300, 300, 4, 4, 128, 0, 0, 0)
    case(dsv, 1, 512, 512, 4, 2, 128, 64, 64, 3)
    case(dsv, 2, 700, 900, 2, 2, 64, 128, 128, 3)
    case(dsv, 1, 700, 900, 2, 2, 96, 64, 64, 5, deterministic=True)
    case(dsv, 1, 512, 512, 4, 4, 128, 64, 8, 13)
    case(dsv, 1, 512, 512, 2, 2, 64, 64, 1, 100)
    # Views: heads first in memory, and slices of one packed projection.
    q = torch.randn(1, 4, 256, 64, device="cuda").bfloat16().transpose(1, 2)
    packed = torch.randn(1, 256, 3, 4, 64, device="cuda").bfloat16()
    close("views", dsv.attention(q, packed[:, :, 1], packed[:, :, 2]),
          reference(q.double(), packed[:, :, 1].double(), packed[:, :, 2].double(), None, None)[0], 0.02)
    # A whole step captured in a graph after one call of the shapes; replayed with other lists.
    low = torch.randn(1, 256, 4, 16, device="cuda").bfloat16()
    leaf = torch.randn(1, 256, 4, 64, device="cuda").bfloat16().requires_grad_()
    seed = torch.randn_like(leaf)

    def step():
        lists = dsv.select(low, low, 2, query_group=64, kv_block=64)
        out = dsv.attention(leaf, leaf, leaf, lists)
        return lists, out, torch.autograd.grad(out, leaf, seed)[0]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lists, out, grad = step()
    for _ in range(2):
        low.copy_(torch.randn_like(low))
        graph.replay()
        exact = leaf.detach().double().requires_grad_()
        exact_out = reference(exact, exact, exact, lists, None)[0]
        close("graph, out", out, exact_out, 0.02)
        close("graph, gradient", grad, torch.autograd.grad(exact_out, exact, seed.double())[0], 0.03)
    # Lists that change between forward and backward are refused, a second derivative too.
    lists = dsv.select(low, low, 2, query_group=64, kv_block=64)
    out = dsv.attention(leaf, leaf, leaf, lists)
    lists.index.zero_()
    for wrong in (lambda: torch.autograd.grad(out, leaf, seed),
                  lambda: torch.autograd.grad(torch.autograd.grad(dsv.attention(leaf, leaf, leaf), leaf, seed, create_graph=True)[0].sum(), leaf)):
        try:
            wrong()
        except RuntimeError:
            pass
        else:
            raise AssertionError("not refused")
    for wrong in (lambda: dsv.attention(q.float(), q.float(), q.float()), lambda: dsv.attention(q[..., :40], q[..., :40], q[..., :40]),
                  lambda: dsv.attention(q, q, q[:, :, :2]), lambda: dsv.attention(q, q, q.cpu()),
                  lambda: dsv.select(low, low[:, :, :2], 2, query_group=64, kv_block=64),
                  lambda: dsv.select(low, low, 2, query_group=64, kv_block=64, keep_mask=torch.zeros(4, 1, device="cuda")),
                  lambda: Lists(torch.zeros(1, device="cuda"), torch.zeros(1, device="cuda"), 64, 64)):
        try:
            wrong()
        except DsvError as refused:
            assert "allowed" in str(refused) or "available" in str(refused), refused
        else:
            raise AssertionError("not refused")
    bad = Lists(torch.full((1, 4, 4, 1), 99, dtype=torch.int32, device="cuda"), torch.ones(1, 4, 4, dtype=torch.int32, device="cuda"), 64, 64)
    dsv.attention(q, q, q, bad)
    try:
        dsv.check()
    except DsvError as found:
        assert "outside the sequence" in str(found), found
    else:
        raise AssertionError("an id out of range is raised")
    dsv.check()
    print("ok")


if __name__ == "__main__":
    main()
