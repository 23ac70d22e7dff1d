//! Owns the C face of dsv-runtime (`include/dsv.h`): handles for plans, plain structures for problems and addresses, and errors
//! as a code with a text. It must never know how a kernel is chosen or launched, nor a tensor library.
//!
//! What functions and fields mean stands in the header, whose names these are. Start at [`dsv_open`].

use dsv_runtime::device::Stream;
use dsv_runtime::{
    AttnLayouts, AttnPlan, BwdArgs, FineArgs, FineProblem, FwdArgs, Keep, KeyLists, Layout, ListPlan,
    ListShape, Notice, Options, QueryLists, Runtime, SelectProblem, Selection, TableSource,
    decode_error_flag,
};
use dsv_spec::{AttnOp, BlockScore, Budget, Deterministic, Dtype, GroupRule, Lists, Problem};
use std::cell::RefCell;
use std::ffi::{CStr, CString, OsStr, c_char, c_void};
use std::fmt::Display;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

/// `DSV_ABI_VERSION`: raised whenever a structure or a function changes.
pub const ABI_VERSION: i32 = 1;

/// `dsv_runtime`: one GPU with its kernels and its table.
pub struct CRuntime(Runtime);

/// `dsv_attention`: a plan.
pub struct CAttention {
    plan: AttnPlan,
    runtime: RuntimeDevice,
}

/// `dsv_selection`: a plan.
pub struct CSelection {
    plan: Selection,
    runtime: RuntimeDevice,
}

/// `dsv_lists`: a plan.
pub struct CLists {
    plan: ListPlan,
    runtime: RuntimeDevice,
}

type RuntimeDevice = Arc<dsv_runtime::Device>;

/// `dsv_options`
#[repr(C)]
#[derive(Clone, Copy)]
pub struct COptions {
    /// `abi_version`
    pub abi_version: i32,
    /// `device`
    pub device: i32,
    /// `bundle`
    pub bundle: *const c_char,
    /// `table`
    pub table: *const c_char,
    /// `notice`
    pub notice: Option<unsafe extern "C" fn(*const c_char, *mut c_void)>,
    /// `notice_data`
    pub notice_data: *mut c_void,
}

/// `dsv_strides`
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct CStrides {
    /// `batch`
    pub batch: i64,
    /// `seq`
    pub seq: i64,
    /// `head`
    pub head: i64,
}

/// `dsv_problem`
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct CProblem {
    /// `dtype`
    pub dtype: u32,
    /// `head_dim`
    pub head_dim: u32,
    /// `query_group`
    pub query_group: u32,
    /// `kv_block`
    pub kv_block: u32,
    /// `batch`
    pub batch: u32,
    /// `num_heads`
    pub num_heads: u32,
    /// `num_kv_heads`
    pub num_kv_heads: u32,
    /// `seqlen_q`
    pub seqlen_q: u32,
    /// `seqlen_kv`
    pub seqlen_kv: u32,
    /// `max_selected`
    pub max_selected: u32,
    /// `backward`
    pub backward: u32,
    /// `deterministic`
    pub deterministic: u32,
    /// `scale`
    pub scale: f32,
}

/// `dsv_layouts`
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct CLayouts {
    /// `q`
    pub q: CStrides,
    /// `k`
    pub k: CStrides,
    /// `v`
    pub v: CStrides,
    /// `out`
    pub out: CStrides,
    /// `d_out`
    pub d_out: CStrides,
    /// `dq`
    pub dq: CStrides,
    /// `dk`
    pub dk: CStrides,
    /// `dv`
    pub dv: CStrides,
}

/// `dsv_attention_facts`
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct CAttentionFacts {
    /// `workspace_bytes`
    pub workspace_bytes: u64,
    /// `num_groups`
    pub num_groups: u32,
    /// `num_kv_blocks`
    pub num_kv_blocks: u32,
    /// `needs_query_lists`
    pub needs_query_lists: u32,
    /// `needs_key_lists`
    pub needs_key_lists: u32,
}

/// `dsv_forward_args`
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct CForward {
    /// `q`
    pub q: u64,
    /// `k`
    pub k: u64,
    /// `v`
    pub v: u64,
    /// `out`
    pub out: u64,
    /// `lse`
    pub lse: u64,
    /// `q2k_index`
    pub q2k_index: u64,
    /// `q2k_count`
    pub q2k_count: u64,
    /// `error_flag`
    pub error_flag: u64,
}

/// `dsv_backward_args`
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct CBackward {
    /// `q`
    pub q: u64,
    /// `k`
    pub k: u64,
    /// `v`
    pub v: u64,
    /// `out`
    pub out: u64,
    /// `lse`
    pub lse: u64,
    /// `d_out`
    pub d_out: u64,
    /// `d_lse`
    pub d_lse: u64,
    /// `dq`
    pub dq: u64,
    /// `dk`
    pub dk: u64,
    /// `dv`
    pub dv: u64,
    /// `q2k_index`
    pub q2k_index: u64,
    /// `q2k_count`
    pub q2k_count: u64,
    /// `k2q_offset`
    pub k2q_offset: u64,
    /// `k2q_index`
    pub k2q_index: u64,
    /// `workspace`
    pub workspace: u64,
    /// `error_flag`
    pub error_flag: u64,
}

/// `dsv_selection_problem`
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct CSelectionProblem {
    /// `rank`
    pub rank: u32,
    /// `query_group`
    pub query_group: u32,
    /// `kv_block`
    pub kv_block: u32,
    /// `group_rule`
    pub group_rule: u32,
    /// `budget`
    pub budget: u32,
    /// `keep_first`
    pub keep_first: u32,
    /// `keep_own`
    pub keep_own: u32,
    /// `batch`
    pub batch: u32,
    /// `num_heads`
    pub num_heads: u32,
    /// `seqlen_q`
    pub seqlen_q: u32,
    /// `seqlen_kv`
    pub seqlen_kv: u32,
    /// `max_selected`
    pub max_selected: u32,
    /// `scale`
    pub scale: f32,
}

/// `dsv_selection_args`
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct CSelect {
    /// `q_lr`
    pub q_lr: u64,
    /// `k_lr`
    pub k_lr: u64,
    /// `budget`
    pub budget: u64,
    /// `keep_mask`
    pub keep_mask: u64,
    /// `q2k_index`
    pub q2k_index: u64,
    /// `q2k_count`
    pub q2k_count: u64,
    /// `error_flag`
    pub error_flag: u64,
}

/// `dsv_lists_shape`
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct CListShape {
    /// `batch`
    pub batch: u32,
    /// `num_heads`
    pub num_heads: u32,
    /// `num_groups`
    pub num_groups: u32,
    /// `num_kv_blocks`
    pub num_kv_blocks: u32,
    /// `max_selected`
    pub max_selected: u32,
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

fn remember(text: &str) {
    // A text with a NUL would end there.
    let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
    LAST_ERROR.with(|last| *last.borrow_mut() = text);
}

/// Runs a call: 0, or -1 and the text of what went wrong. No panic leaves the library.
fn answer(call: impl FnOnce() -> Result<(), String>) -> i32 {
    let text = match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(())) => return 0,
        Ok(Err(text)) => text,
        Err(panic) => {
            let what = panic.downcast_ref::<String>().map(String::as_str);
            let what = what.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic");
            format!("a fault of this library, please report it: {what}")
        }
    };
    remember(&text);
    -1
}

fn text(error: impl Display) -> String {
    error.to_string()
}

/// # Safety
/// Null, or a pointer to a live value.
unsafe fn read<'a, T>(pointer: *const T, what: &str) -> Result<&'a T, String> {
    // SAFETY: the caller's promise.
    unsafe { pointer.as_ref() }.ok_or_else(|| format!("{what} is NULL; allowed: a pointer to one"))
}

/// # Safety
/// Null, or a string that ends in NUL.
unsafe fn path(pointer: *const c_char) -> Option<PathBuf> {
    // SAFETY: the caller's promise.
    let bytes = (!pointer.is_null()).then(|| unsafe { CStr::from_ptr(pointer) }.to_bytes())?;
    Some(PathBuf::from(OsStr::from_bytes(bytes)))
}

/// Gives a handle to the caller.
///
/// # Safety
/// Null, or a place for a pointer.
unsafe fn give<T>(to: *mut *mut T, make: impl FnOnce() -> Result<T, String>) -> Result<(), String> {
    if to.is_null() {
        return Err("the place for the handle is NULL; allowed: the address of a pointer".to_string());
    }
    // SAFETY: not null, and the caller's promise.
    unsafe { to.write(std::ptr::null_mut()) };
    let made = Box::into_raw(Box::new(make()?));
    // SAFETY: as above.
    unsafe { to.write(made) };
    Ok(())
}

/// # Safety
/// Null, or a handle that was given and not taken back.
unsafe fn take<T>(handle: *mut T) {
    if !handle.is_null() {
        // SAFETY: the caller's promise.
        let owned = unsafe { Box::from_raw(handle) };
        // What a drop may panic with is of no use to the caller.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(owned)));
    }
}

fn small<T: TryFrom<u32>>(what: &str, value: u32) -> Result<T, String> {
    T::try_from(value).map_err(|_| format!("{what} is {value}, far beyond what any kernel serves"))
}

fn flag(what: &str, value: u32) -> Result<bool, String> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(format!("{what} is {value}; allowed: 0 and 1")),
    }
}

fn problem(p: &CProblem) -> Result<Problem, String> {
    let dtype = match p.dtype {
        0 => Dtype::Bf16,
        1 => Dtype::F16,
        other => return Err(format!("dtype is {other}; allowed: DSV_BF16 (0), DSV_F16 (1)")),
    };
    let (query_group, kv_block) = (small("query_group", p.query_group)?, small("kv_block", p.kv_block)?);
    if (query_group == 0) != (kv_block == 0) {
        return Err(format!(
            "query_group is {query_group} and kv_block {kv_block}; allowed: both 0 (dense), or neither"
        ));
    }
    Ok(Problem {
        op: if flag("backward", p.backward)? { AttnOp::Bwd } else { AttnOp::Fwd },
        dtype,
        head_dim: small("head_dim", p.head_dim)?,
        lists: Lists::from_block_size(query_group, kv_block),
        batch: p.batch,
        num_heads: p.num_heads,
        num_kv_heads: p.num_kv_heads,
        seqlen_q: p.seqlen_q,
        seqlen_kv: p.seqlen_kv,
        max_selected: p.max_selected,
        deterministic: match flag("deterministic", p.deterministic)? {
            true => Deterministic::Yes,
            false => Deterministic::No,
        },
    })
}

fn layouts(l: &CLayouts) -> AttnLayouts {
    let of = |s: CStrides| Layout { batch: s.batch, seq: s.seq, head: s.head };
    AttnLayouts {
        q: of(l.q),
        k: of(l.k),
        v: of(l.v),
        out: of(l.out),
        d_out: of(l.d_out),
        dq: of(l.dq),
        dk: of(l.dk),
        dv: of(l.dv),
    }
}

fn some(address: u64) -> Option<u64> {
    (address != 0).then_some(address)
}

fn query_lists(index: u64, count: u64) -> Option<QueryLists> {
    (index != 0 || count != 0).then_some(QueryLists { q2k_index: index, q2k_count: count })
}

/// # Safety
/// A stream of the GPU's primary context, or null for its default stream, that lives until the call returns.
unsafe fn stream(device: &RuntimeDevice, raw: *mut c_void) -> Stream {
    if raw.is_null() {
        return device.default_stream();
    }
    // SAFETY: the caller's promise.
    unsafe { device.borrow_stream(raw.cast()) }
}

/// `dsv_abi_version`
#[unsafe(no_mangle)]
pub extern "C" fn dsv_abi_version() -> i32 {
    ABI_VERSION
}

/// `dsv_last_error`
#[unsafe(no_mangle)]
pub extern "C" fn dsv_last_error() -> *const c_char {
    LAST_ERROR.with(|last| last.borrow().as_ptr())
}

/// `dsv_open`
///
/// # Safety
/// As `dsv.h` says of its arguments; so for all functions below.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dsv_open(options: *const COptions, runtime: *mut *mut CRuntime) -> i32 {
    let open = || {
        // The version first: a structure of another may be shorter.
        // SAFETY: the caller's promise; every version begins with its number.
        let version = *unsafe { read(options.cast::<i32>(), "options") }?;
        if version != ABI_VERSION {
            return Err(format!(
                "abi_version is {version}; allowed: {ABI_VERSION}, which this library has: include the dsv.h beside it"
            ));
        }
        // SAFETY: the caller's promise.
        let o = *unsafe { read(options, "options") }?;
        let ordinal =
            usize::try_from(o.device).map_err(|_| format!("device is {}; allowed: 0 and more", o.device))?;
        // SAFETY: the caller's promise.
        let (bundle, table) = unsafe { (path(o.bundle), path(o.table)) };
        // The address as a number: what a caller hands on may cross threads, and is the caller's to share.
        let (notice, data) = (o.notice, o.notice_data as usize);
        let report = move |said: &Notice| {
            if let Some(notice) = notice {
                let said = CString::new(said.to_string().replace('\0', " ")).unwrap_or_default();
                // SAFETY: the caller's promise.
                unsafe { notice(said.as_ptr(), data as *mut c_void) };
            }
        };
        let options = Options {
            ordinal,
            bundle,
            table: table.map_or(TableSource::Committed, TableSource::File),
            report: Arc::new(report),
            ..Options::default()
        };
        Runtime::open(options).map(CRuntime).map_err(text)
    };
    // SAFETY: the caller's promise.
    answer(|| unsafe { give(runtime, open) })
}

/// `dsv_close`
///
/// # Safety
/// See [`dsv_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dsv_close(runtime: *mut CRuntime) {
    // SAFETY: the caller's promise.
    unsafe { take(runtime) }
}

/// `dsv_attention_new`
///
/// # Safety
/// See [`dsv_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dsv_attention_new(
    runtime: *const CRuntime,
    asked: *const CProblem,
    strides: *const CLayouts,
    attention: *mut *mut CAttention,
) -> i32 {
    let make = || {
        // SAFETY: the caller's promise.
        let (runtime, asked) = unsafe { (read(runtime, "runtime")?, read(asked, "problem")?) };
        // SAFETY: the caller's promise.
        let strides = unsafe { strides.as_ref() };
        let p = problem(asked)?;
        let layouts = strides.map_or_else(|| AttnLayouts::bshd(&p), layouts);
        let scale = (asked.scale != 0.0).then_some(asked.scale);
        let plan = runtime.0.attention(&p, &layouts, scale).map_err(text)?;
        Ok(CAttention { plan, runtime: runtime.0.device().clone() })
    };
    // SAFETY: the caller's promise.
    answer(|| unsafe { give(attention, make) })
}

/// `dsv_attention_free`
///
/// # Safety
/// See [`dsv_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dsv_attention_free(attention: *mut CAttention) {
    // SAFETY: the caller's promise.
    unsafe { take(attention) }
}

/// `dsv_attention_facts_of`
///
/// # Safety
/// See [`dsv_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dsv_attention_facts_of(
    attention: *const CAttention,
    facts: *mut CAttentionFacts,
) -> i32 {
    answer(|| {
        // SAFETY: the caller's promise.
        let plan = &unsafe { read(attention, "attention") }?.plan;
        // SAFETY: the caller's promise.
        let facts = unsafe { facts.as_mut() }.ok_or("facts is NULL; allowed: a pointer to one")?;
        *facts = CAttentionFacts {
            workspace_bytes: plan.workspace_bytes(),
            num_groups: plan.problem().num_groups(),
            num_kv_blocks: plan.problem().num_kv_blocks(),
            needs_query_lists: u32::from(plan.needs_query_lists()),
            needs_key_lists: u32::from(plan.needs_key_lists()),
        };
        Ok(())
    })
}

/// `dsv_attention_explain`
///
/// # Safety
/// See [`dsv_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dsv_attention_explain(
    runtime: *const CRuntime,
    asked: *const CProblem,
    to: *mut c_char,
    bytes: usize,
) -> i64 {
    let mut needed = -1;
    let result = answer(|| {
        // SAFETY: the caller's promise.
        let (runtime, asked) = unsafe { (read(runtime, "runtime")?, read(asked, "problem")?) };
        let said = runtime.0.explain(&problem(asked)?).map_err(text)?.to_string().replace('\0', " ");
        needed = said.len() as i64 + 1;
        if !to.is_null() && bytes > 0 {
            let len = said.len().min(bytes - 1);
            // SAFETY: the caller's promise: room for `bytes`, of which these are len + 1.
            unsafe {
                std::ptr::copy_nonoverlapping(said.as_ptr().cast(), to, len);
                to.add(len).write(0);
            }
        }
        Ok(())
    });
    if result == 0 { needed } else { -1 }
}

/// `dsv_attention_forward`
///
/// # Safety
/// See [`dsv_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dsv_attention_forward(
    attention: *const CAttention,
    queue: *mut c_void,
    args: *const CForward,
) -> i32 {
    answer(|| {
        // SAFETY: the caller's promise.
        let (attention, a) = unsafe { (read(attention, "attention")?, read(args, "args")?) };
        let args = FwdArgs {
            q: a.q,
            k: a.k,
            v: a.v,
            out: a.out,
            lse: a.lse,
            lists: query_lists(a.q2k_index, a.q2k_count),
            error_flag: a.error_flag,
        };
        // SAFETY: the caller's promise.
        unsafe { attention.plan.forward(&stream(&attention.runtime, queue), &args) }.map_err(text)
    })
}

/// `dsv_attention_backward`
///
/// # Safety
/// See [`dsv_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dsv_attention_backward(
    attention: *const CAttention,
    queue: *mut c_void,
    args: *const CBackward,
) -> i32 {
    answer(|| {
        // SAFETY: the caller's promise.
        let (attention, a) = unsafe { (read(attention, "attention")?, read(args, "args")?) };
        let given = a.k2q_offset != 0 || a.k2q_index != 0;
        let args = BwdArgs {
            q: a.q,
            k: a.k,
            v: a.v,
            out: a.out,
            lse: a.lse,
            d_out: a.d_out,
            d_lse: some(a.d_lse),
            dq: a.dq,
            dk: a.dk,
            dv: a.dv,
            lists: given.then_some(KeyLists { k2q_offset: a.k2q_offset, k2q_index: a.k2q_index }),
            query_lists: query_lists(a.q2k_index, a.q2k_count),
            workspace: a.workspace,
            error_flag: a.error_flag,
        };
        // SAFETY: the caller's promise.
        unsafe { attention.plan.backward(&stream(&attention.runtime, queue), &args) }.map_err(text)
    })
}

/// Blocks by the kernel that keeps all scores where it has room for them, anything else by the one that recomputes them: both
/// choose the same.
fn select_plan(
    runtime: &Runtime,
    p: &CSelectionProblem,
    q_lr: Layout,
    k_lr: Layout,
) -> Result<Selection, String> {
    let group_rule = match p.group_rule {
        0 => GroupRule::Centre,
        1 => GroupRule::Mean,
        2 => GroupRule::Max4,
        3 => GroupRule::Mass4,
        other => {
            return Err(format!(
                "group_rule is {other}; allowed: DSV_CENTRE (0), DSV_MEAN (1), DSV_MAX4 (2), DSV_MASS4 (3)"
            ));
        }
    };
    let budget = match p.budget {
        0 => Budget::TopK,
        1 => Budget::TopP,
        other => return Err(format!("budget is {other}; allowed: DSV_TOP_K (0), DSV_TOP_P (1)")),
    };
    let fine = FineProblem {
        rank: small("rank", p.rank)?,
        query_group: small("query_group", p.query_group)?,
        kv_block: small("kv_block", p.kv_block)?,
        group_rule,
        block_score: if group_rule == GroupRule::Mass4 { BlockScore::Mass } else { BlockScore::Max },
        budget,
        scale: if p.scale == 0.0 { 1.0 } else { p.scale },
        keep: Keep { first: p.keep_first, own: flag("keep_own", p.keep_own)? },
        batch: p.batch,
        num_heads: p.num_heads,
        seqlen_q: p.seqlen_q,
        seqlen_kv: p.seqlen_kv,
        max_selected: p.max_selected,
    };
    if fine.kv_block >= 64 && budget == Budget::TopK && GroupRule::PROXIES.contains(&group_rule) {
        let FineProblem {
            rank,
            query_group,
            kv_block,
            keep,
            batch,
            num_heads,
            seqlen_q,
            seqlen_kv,
            max_selected,
            ..
        } = fine;
        let blocks = SelectProblem {
            rank,
            query_group,
            kv_block,
            group_rule,
            keep,
            batch,
            num_heads,
            seqlen_q,
            seqlen_kv,
            max_selected,
        };
        return match runtime.selection(&blocks, q_lr, k_lr) {
            Ok(plan) => Ok(Selection::Blocks(plan)),
            // What the problem has wrong, or that there is no room: the other kernel for blocks is not always there.
            Err(first) => match runtime.fine_selection(&fine, q_lr, k_lr) {
                Ok(plan) => Ok(Selection::Fine(plan)),
                Err(_) => Err(text(first)),
            },
        };
    }
    runtime.fine_selection(&fine, q_lr, k_lr).map(Selection::Fine).map_err(text)
}

/// `dsv_selection_new`
///
/// # Safety
/// See [`dsv_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dsv_selection_new(
    runtime: *const CRuntime,
    asked: *const CSelectionProblem,
    q_lr: *const CStrides,
    k_lr: *const CStrides,
    selection: *mut *mut CSelection,
) -> i32 {
    let make = || {
        // SAFETY: the caller's promise.
        let (runtime, p) = unsafe { (read(runtime, "runtime")?, read(asked, "problem")?) };
        let layout = |strides: *const CStrides, seqlen| {
            // SAFETY: the caller's promise.
            let given = unsafe { strides.as_ref() };
            let given = given.map(|s| Layout { batch: s.batch, seq: s.seq, head: s.head });
            given.unwrap_or(Layout::bshd(seqlen, p.num_heads, p.rank))
        };
        let (q_lr, k_lr) = (layout(q_lr, p.seqlen_q), layout(k_lr, p.seqlen_kv));
        let plan = select_plan(&runtime.0, p, q_lr, k_lr)?;
        Ok(CSelection { plan, runtime: runtime.0.device().clone() })
    };
    // SAFETY: the caller's promise.
    answer(|| unsafe { give(selection, make) })
}

/// `dsv_selection_free`
///
/// # Safety
/// See [`dsv_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dsv_selection_free(selection: *mut CSelection) {
    // SAFETY: the caller's promise.
    unsafe { take(selection) }
}

/// `dsv_select`
///
/// # Safety
/// See [`dsv_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dsv_select(
    selection: *const CSelection,
    queue: *mut c_void,
    args: *const CSelect,
) -> i32 {
    answer(|| {
        // SAFETY: the caller's promise.
        let (selection, a) = unsafe { (read(selection, "selection")?, read(args, "args")?) };
        let args = FineArgs {
            q_lr: a.q_lr,
            k_lr: a.k_lr,
            budget: a.budget,
            q2k_index: Some(a.q2k_index),
            q2k_count: a.q2k_count,
            bitmap: None,
            scores: None,
            keep_mask: some(a.keep_mask),
            capped: None,
            error_flag: a.error_flag,
        };
        // SAFETY: the caller's promise.
        unsafe { selection.plan.select(&stream(&selection.runtime, queue), &args) }.map_err(text)
    })
}

/// `dsv_lists_new`
///
/// # Safety
/// See [`dsv_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dsv_lists_new(
    runtime: *const CRuntime,
    shape: *const CListShape,
    lists: *mut *mut CLists,
) -> i32 {
    let make = || {
        // SAFETY: the caller's promise.
        let (runtime, s) = unsafe { (read(runtime, "runtime")?, read(shape, "shape")?) };
        let shape = ListShape {
            batch: s.batch,
            num_heads: s.num_heads,
            num_groups: s.num_groups,
            num_kv_blocks: s.num_kv_blocks,
            max_selected: s.max_selected,
        };
        let plan = runtime.0.lists(&shape).map_err(text)?;
        Ok(CLists { plan, runtime: runtime.0.device().clone() })
    };
    // SAFETY: the caller's promise.
    answer(|| unsafe { give(lists, make) })
}

/// `dsv_lists_free`
///
/// # Safety
/// See [`dsv_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dsv_lists_free(lists: *mut CLists) {
    // SAFETY: the caller's promise.
    unsafe { take(lists) }
}

/// `dsv_lists_invert`
///
/// # Safety
/// See [`dsv_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dsv_lists_invert(
    lists: *const CLists,
    queue: *mut c_void,
    q2k_index: u64,
    q2k_count: u64,
    k2q_offset: u64,
    k2q_index: u64,
    error_flag: u64,
) -> i32 {
    answer(|| {
        // SAFETY: the caller's promise.
        let lists = unsafe { read(lists, "lists") }?;
        let (from, to) = (QueryLists { q2k_index, q2k_count }, KeyLists { k2q_offset, k2q_index });
        // SAFETY: the caller's promise.
        unsafe { lists.plan.invert(&stream(&lists.runtime, queue), &from, &to, error_flag) }.map_err(text)
    })
}

/// `dsv_lists_validate`
///
/// # Safety
/// See [`dsv_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dsv_lists_validate(
    lists: *const CLists,
    queue: *mut c_void,
    q2k_index: u64,
    q2k_count: u64,
    error_flag: u64,
) -> i32 {
    answer(|| {
        // SAFETY: the caller's promise.
        let lists = unsafe { read(lists, "lists") }?;
        let from = QueryLists { q2k_index, q2k_count };
        // SAFETY: the caller's promise.
        unsafe { lists.plan.validate(&stream(&lists.runtime, queue), &from, error_flag) }.map_err(text)
    })
}

/// `dsv_check_error_flag`
#[unsafe(no_mangle)]
pub extern "C" fn dsv_check_error_flag(flag: i32) -> i32 {
    answer(|| decode_error_flag(flag).map_err(text))
}
