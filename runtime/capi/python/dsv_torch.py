"""DSV's sparse attention as a PyTorch function, through the C interface (../include/dsv.h, libdsv.so).

    cargo build --release -p dsv-capi            # target/release/libdsv.so; DSV_LIBRARY names another

    from dsv_torch import Dsv
    dsv = Dsv()                                                     # the current GPU
    lists = dsv.select(q_lr, k_lr, kept, query_group=64, kv_block=64)
    out = dsv.attention(q, k, v, lists)                             # differentiable in q, k, v
    dsv.check()                                                     # at the next synchronisation: raises what kernels found

Tensors are [batch, tokens, heads, columns] of bf16 (f16 where its kernels were added). Kernels run on PyTorch's current stream; nothing
is waited for but in `check`, and CUDA graphs may capture everything after one call of the same shapes, where budgets are numbers; the
graph needs its Dsv alive. Query groups and KV units are consecutive tokens: a video's tokens are put in the order of nested cubes first
(README.md, "The contract"). First derivatives only.
"""

import ctypes
import functools
import os
import re
import weakref

import torch
from torch.autograd.function import once_differentiable

_HERE = os.path.dirname(os.path.abspath(__file__))
_HEADER = os.path.join(_HERE, "..", "include", "dsv.h")
_TYPES = {"uint32_t": ctypes.c_uint32, "int32_t": ctypes.c_int32, "uint64_t": ctypes.c_uint64, "int64_t": ctypes.c_int64,
          "float": ctypes.c_float, "size_t": ctypes.c_size_t}
_DTYPES = {torch.bfloat16: "DSV_BF16", torch.float16: "DSV_F16"}
_NOTICE = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p)


class DsvError(RuntimeError):
    """What the library refused: which value, what is allowed, what to do."""


def read_header(path=_HEADER):
    """Structures and constants of dsv.h: ({name: ctypes.Structure}, {name: int}). The header is the only place they are written."""
    with open(path) as file:
        text = re.sub(r"/\*.*?\*/", "", file.read(), flags=re.S)
    constants = {name: int(value) for name, value in re.findall(r"\b(DSV_\w+)\s*=\s*(\d+)", text)}
    constants.update({name: int(value) for name, value in re.findall(r"#define (DSV_\w+) (\d+)", text)})
    structures = {}
    for body, name in re.findall(r"typedef struct \{(.*?)\}\s*(\w+);", text, flags=re.S):
        fields = []
        for line in filter(None, (part.strip() for part in body.split(";"))):
            pointer = re.search(r"\(\*(\w+)\)", line)
            if pointer:
                fields.append((pointer.group(1), ctypes.c_void_p))
                continue
            kind, names = re.match(r"(?:const )?(\w+)\s+(.*)", line, flags=re.S).groups()
            for field in (part.strip() for part in names.split(",")):
                if field.startswith("*"):
                    fields.append((field[1:], ctypes.c_char_p if kind == "char" else ctypes.c_void_p))
                else:
                    fields.append((field, structures.get(kind) or _TYPES[kind]))
        structures[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return structures, constants


_S, _C = read_header()


def _library(path):
    path = path or os.environ.get("DSV_LIBRARY") or os.path.join(_HERE, "..", "..", "..", "target", "release", "libdsv.so")
    if not os.path.exists(path):
        raise DsvError(f"{path} does not exist\n  next: cargo build --release -p dsv-capi, or DSV_LIBRARY=/path/to/libdsv.so")
    library = ctypes.CDLL(path)
    library.dsv_last_error.restype = ctypes.c_char_p
    library.dsv_attention_explain.restype = ctypes.c_int64
    for name in ("dsv_close", "dsv_attention_free", "dsv_selection_free", "dsv_lists_free"):
        getattr(library, name).restype = None
    found = library.dsv_abi_version()
    if found != _C["DSV_ABI_VERSION"]:
        raise DsvError(f"{path} has ABI version {found}; needed: {_C['DSV_ABI_VERSION']}, of the dsv.h beside this file")
    return library


class Lists:
    """KV lists: which units of `kv_block` consecutive keys each group of `query_group` consecutive queries attends to.

    index: i32 [B, H, G, max_selected], ascending and unique up to the count; count: i32 [B, H, G]. Lists made elsewhere that are not
    ascending give wrong results.
    """

    def __init__(self, index, count, query_group, kv_block):
        for name, tensor, dims in (("index", index, 4), ("count", count, 3)):
            if tensor.dtype != torch.int32 or tensor.dim() != dims or not tensor.is_contiguous() or not tensor.is_cuda:
                raise DsvError(f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; "
                               f"allowed: contiguous int32 of {dims} dimensions on the GPU")
        if index.shape[:3] != count.shape:
            raise DsvError(f"index is {tuple(index.shape)} and count {tuple(count.shape)}; allowed: [B, H, G, n] and [B, H, G]")
        self.index, self.count, self.query_group, self.kv_block = index, count, query_group, kv_block
        self._inverse = {}


def _with_its_gpu(method):
    """The library makes its GPU the current one: what was before is put back."""
    @functools.wraps(method)
    def inner(self, *arguments, **named):
        with torch.cuda.device(self.device):
            return method(self, *arguments, **named)
    return inner


def _free(library, runtime, plans):
    for function, handle in plans:
        getattr(library, function)(handle)
    library.dsv_close(runtime)


class Dsv:
    """One GPU with its kernels and its dispatch table. It keeps a plan for every shape it has seen."""

    def __init__(self, device=None, library=None, bundle=None, table=None, notice=None):
        """notice: a function of a string, told what the user should know; by default it is printed."""
        self._lib = _library(library)
        index = None if device is None else torch.device(device).index
        self.device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        torch.cuda.init()
        self._notice = _NOTICE(lambda text, _: (notice or print)(text.decode()))
        options = _S["dsv_options"](abi_version=_C["DSV_ABI_VERSION"], device=self.device.index,
                                    bundle=bundle.encode() if bundle else None, table=table.encode() if table else None,
                                    notice=ctypes.cast(self._notice, ctypes.c_void_p))
        with torch.cuda.device(self.device):
            self._runtime = self._open("dsv_open", ctypes.byref(options))
        self._handles = []
        weakref.finalize(self, _free, self._lib, self._runtime, self._handles)
        self._flag = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._plans = {}

    def _call(self, function, *arguments):
        if getattr(self._lib, function)(*arguments) != 0:
            raise DsvError(self._lib.dsv_last_error().decode())

    def _open(self, function, *arguments):
        handle = ctypes.c_void_p()
        self._call(function, *arguments, ctypes.byref(handle))
        return handle

    def _made(self, kind, *arguments):
        handle = self._open(f"dsv_{kind}_new", self._runtime, *arguments)
        self._handles.append((f"dsv_{kind}_free", handle))
        return handle

    def _plan(self, key, make):
        if key not in self._plans:
            self._plans[key] = make()
        return self._plans[key]

    def _here(self, **tensors):
        for name, tensor in tensors.items():
            if tensor.device != self.device:
                raise DsvError(f"{name} is on {tensor.device}; allowed: {self.device}, which this Dsv opened")

    def _stream(self):
        return ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)

    @_with_its_gpu
    def check(self):
        """Waits for the GPU, and raises what kernels found wrong since the last call (lists out of range, NaN scores)."""
        torch.cuda.synchronize(self.device)
        flag = int(self._flag.item())
        self._flag.zero_()
        self._call("dsv_check_error_flag", ctypes.c_int32(flag))

    def _numbers(self, budget, heads, dtype):
        """A number for all heads, or a sequence or tensor of one each, on the GPU."""
        if isinstance(budget, torch.Tensor):
            self._here(budget=budget)
            if budget.shape != (heads,):
                raise DsvError(f"budget is {tuple(budget.shape)}; allowed: a number, or one of each of {heads} heads")
            return budget.to(dtype).contiguous()
        values = tuple(budget) if hasattr(budget, "__len__") else (budget,) * heads
        if len(values) != heads:
            raise DsvError(f"budget has {len(values)} numbers; allowed: one, or one of each of {heads} heads")
        # Copied to the GPU once: a copy waits.
        return self._plan(("budget", values, dtype), lambda: torch.tensor(values, dtype=dtype, device=self.device))

    @torch.compiler.disable
    @torch.no_grad()
    @_with_its_gpu
    def select(self, q_lr, k_lr, budget, *, query_group, kv_block, max_selected=None, rule=None, top_p=False, scale=1.0,
               keep_first=0, keep_own=False, keep_mask=None):
        """Lists of the units with the largest low-rank scores, exact.

        q_lr, k_lr: bf16 [B, S, H, rank], rank 16 unless others were added; a key for every query head. budget: units to keep, a number
        or one a head (with top_p: shares of the predicted softmax mass); a tensor needs max_selected. max_selected: width of the
        lists (default: the largest number; all units with top_p). rule: mean (the default) or centre, which top_p needs, with
        kv_block 8; max4 and mass4 where their kernels were added. keep_first, keep_own, keep_mask (int32 [G, ceil(N / 32)]): units
        listed before all others.
        """
        rule = rule or ("centre" if top_p else "mean")
        if rule not in ("centre", "mean", "max4", "mass4"):
            raise DsvError(f"rule is {rule!r}; allowed: centre, mean, max4, mass4")
        batch, seqlen_q, heads, rank = q_lr.shape
        seqlen_kv = k_lr.shape[1]
        if k_lr.shape != (batch, seqlen_kv, heads, rank):
            raise DsvError(f"k_lr is {tuple(k_lr.shape)}; allowed: {(batch, seqlen_kv, heads, rank)}, as many heads as q_lr")
        if q_lr.dtype != torch.bfloat16 or k_lr.dtype != torch.bfloat16:
            raise DsvError(f"q_lr and k_lr are {q_lr.dtype} and {k_lr.dtype}; allowed: bfloat16")
        self._here(q_lr=q_lr, k_lr=k_lr)
        units, groups = -(-seqlen_kv // kv_block), -(-seqlen_q // query_group)
        if keep_mask is not None:
            self._here(keep_mask=keep_mask)
            shape = (groups, -(-units // 32))
            if keep_mask.dtype != torch.int32 or keep_mask.shape != shape or not keep_mask.is_contiguous():
                raise DsvError(f"keep_mask is {keep_mask.dtype} {tuple(keep_mask.shape)}; allowed: contiguous int32 {shape}")
        if max_selected is None:
            if top_p:
                max_selected = units
            elif isinstance(budget, torch.Tensor):
                raise DsvError("max_selected is absent, and the budget a tensor; allowed: its largest number, or more")
            else:
                max_selected = min(max(budget) if hasattr(budget, "__len__") else budget, units)
        numbers = self._numbers(budget, heads, torch.float32 if top_p else torch.int32)
        problem = dict(rank=rank, query_group=query_group, kv_block=kv_block, group_rule=_C["DSV_" + rule.upper()],
                       budget=_C["DSV_TOP_P" if top_p else "DSV_TOP_K"], keep_first=keep_first, keep_own=int(keep_own), batch=batch,
                       num_heads=heads, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, max_selected=max_selected, scale=scale)
        q_lr, k_lr = _rows(q_lr), _rows(k_lr)
        key = ("select", *problem.values(), q_lr.stride(), k_lr.stride())
        plan = self._plan(key, lambda: self._made(
            "selection", ctypes.byref(_S["dsv_selection_problem"](**problem)), ctypes.byref(_strides(q_lr)),
            ctypes.byref(_strides(k_lr))))
        index = torch.zeros(batch, heads, groups, max_selected, dtype=torch.int32, device=self.device)
        count = torch.empty(batch, heads, groups, dtype=torch.int32, device=self.device)
        arguments = _S["dsv_selection_args"](
            q_lr=q_lr.data_ptr(), k_lr=k_lr.data_ptr(), budget=numbers.data_ptr(),
            keep_mask=0 if keep_mask is None else keep_mask.data_ptr(), q2k_index=index.data_ptr(), q2k_count=count.data_ptr(),
            error_flag=self._flag.data_ptr())
        self._call("dsv_select", plan, self._stream(), ctypes.byref(arguments))
        return Lists(index, count, query_group, kv_block)

    @torch.compiler.disable
    @_with_its_gpu
    def attention(self, q, k, v, lists=None, *, deterministic=False, scale=None, return_lse=False):
        """softmax(scale Q K^T) V over the listed keys, of all keys without lists. q [B, Sq, H, D]; k, v [B, Skv, Hkv, D].

        Differentiable in q, k, v, and in the lse (f32 [B, H, Sq]) that return_lse adds. deterministic: the same gradients bit by
        bit every time. scale: default 1 / sqrt(D).
        """
        out, lse = _Attention.apply(q, k, v, self, lists, deterministic, scale)
        return (out, lse) if return_lse else out

    def _inverse(self, lists, units):
        """The lists of the backward: made once for lists that do not change, but in a capture, whose replays may see others."""
        captured = torch.cuda.is_current_stream_capturing()
        key = (units, lists.index._version, lists.count._version)
        if captured or key not in lists._inverse:
            batch, heads, groups, width = lists.index.shape
            shape = (batch, heads, groups, units, width)
            plan = self._plan(("lists", *shape), lambda: self._made("lists", ctypes.byref(_S["dsv_lists_shape"](*shape))))
            offset = torch.empty(batch, heads, units + 1, dtype=torch.int32, device=self.device)
            index = torch.empty(batch, heads, groups * width, dtype=torch.int32, device=self.device)
            address = lambda tensor: ctypes.c_uint64(tensor.data_ptr())
            self._call("dsv_lists_invert", plan, self._stream(), address(lists.index), address(lists.count), address(offset),
                       address(index), address(self._flag))
            if captured:
                return offset, index
            lists._inverse = {key: (offset, index)}
        return lists._inverse[key]

    def _attention_plan(self, problem, layouts):
        def make():
            strides = _S["dsv_layouts"](*(_S["dsv_strides"](*one) for one in layouts))
            plan = self._made("attention", ctypes.byref(_S["dsv_problem"](**problem)), ctypes.byref(strides))
            facts = _S["dsv_attention_facts"]()
            self._call("dsv_attention_facts_of", plan, ctypes.byref(facts))
            return plan, facts
        return self._plan(("attention", *problem.values(), layouts), make)


def _rows(tensor):
    """The tensor, copied only where TMA could not read it: columns next to each other, 16 bytes aligned, no row twice."""
    step = 16 // tensor.element_size()
    sizes = [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1]
    apart = all(stride >= sum((n - 1) * s for s, n in sizes if s < stride) + 1 for stride, _ in sizes)
    apart = apart and len({stride for stride, _ in sizes}) == len(sizes)
    aligned = all(stride % step == 0 for stride, size in zip(tensor.stride()[:-1], tensor.shape) if size > 1)
    if apart and aligned and tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _strides(tensor):
    return _S["dsv_strides"](*tensor.stride()[:3])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, dsv, lists, deterministic, scale):
        if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
            raise DsvError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; allowed: one of bfloat16, float16 for all")
        wanted = (q.shape[0], k.shape[1], k.shape[2], q.shape[3])
        for name, tensor in (("k", k), ("v", v)):
            if tensor.shape != wanted:
                raise DsvError(f"{name} is {tuple(tensor.shape)}; allowed: {wanted}, the batch and columns of q {tuple(q.shape)}")
        dsv._here(q=q, k=k, v=v)
        q, k, v = _rows(q), _rows(k), _rows(v)
        batch, seqlen_q, heads, columns = q.shape
        seqlen_kv, kv_heads = k.shape[1:3]
        problem = dict(dtype=_C[_DTYPES[q.dtype]], head_dim=columns, query_group=lists.query_group if lists else 0,
                       kv_block=lists.kv_block if lists else 0, batch=batch, num_heads=heads, num_kv_heads=kv_heads,
                       seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, max_selected=lists.index.shape[3] if lists else 0,
                       backward=int(any(ctx.needs_input_grad[:3])), deterministic=int(deterministic), scale=scale or 0.0)
        if lists:
            dsv._here(index=lists.index, count=lists.count)
            needed = (batch, heads, -(-seqlen_q // lists.query_group))
            if tuple(lists.count.shape) != needed:
                raise DsvError(f"lists are for [B, H, G] = {tuple(lists.count.shape)}; q needs {needed}")
        out = torch.empty(batch, seqlen_q, heads, columns, dtype=q.dtype, device=q.device)
        lse = torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=q.device)
        grad_k = torch.empty_like(k, memory_format=torch.contiguous_format).stride() if problem["backward"] else k.stride()
        layouts = tuple(s[:3] for s in (q.stride(), k.stride(), v.stride(), out.stride(), out.stride(), out.stride(), grad_k, grad_k))
        plan, _ = dsv._attention_plan(problem, layouts)
        arguments = _S["dsv_forward_args"](
            q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=out.data_ptr(), lse=lse.data_ptr(),
            q2k_index=lists.index.data_ptr() if lists else 0, q2k_count=lists.count.data_ptr() if lists else 0,
            error_flag=dsv._flag.data_ptr())
        dsv._call("dsv_attention_forward", plan, dsv._stream(), ctypes.byref(arguments))
        # Lists too: autograd then refuses a backward over lists that were changed since.
        ctx.save_for_backward(q, k, v, out, lse, *((lists.index, lists.count) if lists else ()))
        ctx.dsv, ctx.lists, ctx.problem, ctx.layouts = dsv, lists, problem, layouts
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_lse):
        with torch.cuda.device(ctx.dsv.device):
            return _Attention._backward(ctx, d_out, d_lse)

    @staticmethod
    def _backward(ctx, d_out, d_lse):
        q, k, v, out, lse, *_ = ctx.saved_tensors
        dsv, lists = ctx.dsv, ctx.lists
        plan, facts = dsv._attention_plan(ctx.problem, ctx.layouts)
        d_out = torch.zeros_like(out) if d_out is None else _rows(d_out.contiguous())
        d_lse = None if d_lse is None else d_lse.to(torch.float32).contiguous()
        dq = torch.empty_like(out)
        dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
        workspace = torch.empty(facts.workspace_bytes, dtype=torch.uint8, device=q.device)
        arguments = _S["dsv_backward_args"](
            q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=out.data_ptr(), lse=lse.data_ptr(), d_out=d_out.data_ptr(),
            d_lse=0 if d_lse is None else d_lse.data_ptr(), dq=dq.data_ptr(), dk=dk.data_ptr(), dv=dv.data_ptr(),
            workspace=workspace.data_ptr(), error_flag=dsv._flag.data_ptr())
        if facts.needs_query_lists:
            arguments.q2k_index, arguments.q2k_count = lists.index.data_ptr(), lists.count.data_ptr()
        if facts.needs_key_lists:
            offset, index = dsv._inverse(lists, facts.num_kv_blocks)
            arguments.k2q_offset, arguments.k2q_index = offset.data_ptr(), index.data_ptr()
        dsv._call("dsv_attention_backward", plan, dsv._stream(), ctypes.byref(arguments))
        return dq, dk, dv, None, None, None, None
