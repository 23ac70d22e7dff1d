//! PTX text to statements: labels resolved, operands taken apart, every declaration known. No instruction has a meaning
//! here.

use std::collections::HashMap;

/// Where a register lives: predicates are one mask a warp, 16- and 32-bit registers share a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Class {
    Pred,
    Word,
    Double,
}

/// A register: its file and its number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Reg {
    pub(crate) class: Class,
    pub(crate) index: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Operand {
    Reg(Reg),
    /// A predicate register read inverted.
    Not(Reg),
    /// A number as written.
    Number(String),
    /// `%tid.x` and its like.
    Special(String),
    /// A variable, a parameter or a function.
    Symbol(String),
    Vector(Vec<Operand>),
    /// `[base + offset]`, or `[base, {coordinates}]`.
    Address {
        base: Box<Operand>,
        offset: i64,
        rest: Vec<Operand>,
    },
    /// `d|p`.
    Pair(Box<Operand>, Box<Operand>),
    /// `_`.
    Sink,
}

#[derive(Clone, Debug)]
pub(crate) struct Statement {
    /// The line of the text it begins in, from 1.
    pub(crate) line: u32,
    /// Predicate and whether it is inverted.
    pub(crate) guard: Option<(u32, bool)>,
    /// `ld`, `global`, `v4`, `f32`.
    pub(crate) opcode: Vec<String>,
    pub(crate) operands: Vec<Operand>,
    /// Of a branch: the statement it goes to.
    pub(crate) target: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Global,
    Const,
    Shared,
    Local,
    Param,
}

#[derive(Clone, Debug)]
pub(crate) struct Variable {
    pub(crate) name: String,
    pub(crate) space: Space,
    pub(crate) align: u32,
    /// 0 for an array whose size the launch gives.
    pub(crate) bytes: u32,
    pub(crate) init: Vec<u8>,
}

#[derive(Debug)]
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) entry: bool,
    pub(crate) params: Vec<Variable>,
    pub(crate) variables: Vec<Variable>,
    pub(crate) statements: Vec<Statement>,
    /// Registers of each file: predicates, words, doubles.
    pub(crate) registers: [u32; 3],
    /// `.maxntid`, threads.
    pub(crate) max_threads: u32,
    /// `.reqnctapercluster`; ones where the launch decides.
    pub(crate) cluster: [u32; 3],
}

#[derive(Debug)]
pub(crate) struct Text {
    pub(crate) variables: Vec<Variable>,
    pub(crate) functions: Vec<Function>,
}

/// A piece of the text that ends in `;`, `{`, `}` or a label's `:`.
enum Piece<'a> {
    Statement(&'a str),
    /// A function's head, or nothing for a block.
    Open(&'a str),
    Close,
    Label(&'a str),
}

/// Cuts the text. Comments become spaces first, so that lines keep their numbers.
fn pieces(text: &str) -> Vec<(u32, Piece<'_>)> {
    let bytes = text.as_bytes();
    let mut found = Vec::new();
    let (mut start, mut line, mut braces) = (0, 1u32, 0);
    let mut first_line = 1;
    let mut at = 0;
    let mut fresh = true;
    while at < bytes.len() {
        let c = bytes[at];
        if c == b'\n' {
            line += 1;
            // Directives of the file end with their line.
            let head = text[start..at].trim();
            if braces == 0
                && [".version", ".target", ".address_size", ".maxntid", ".minnctapersm", ".reqntid"]
                    .iter()
                    .any(|d| head.starts_with(d))
                && !head.is_empty()
            {
                // Kept as statements of their own; those of a function follow its head, see below.
                found.push((first_line, Piece::Statement(head)));
                start = at + 1;
                fresh = true;
            }
            at += 1;
            continue;
        }
        if fresh && !c.is_ascii_whitespace() {
            (fresh, first_line) = (false, line);
        }
        let head = if b";{}:".contains(&c) { text[start..at].trim() } else { "" };
        match c {
            b';' if braces == 0 => {
                found.push((first_line, Piece::Statement(head)));
                (start, fresh) = (at + 1, true);
            }
            b'{' => {
                let function = head.contains(".entry") || head.contains(".func");
                if braces == 0 && (head.is_empty() || function && !head.contains('=')) {
                    found.push((first_line, Piece::Open(head)));
                    (start, fresh) = (at + 1, true);
                } else {
                    braces += 1;
                }
            }
            b'}' => {
                if braces > 0 {
                    braces -= 1;
                } else {
                    found.push((first_line, Piece::Close));
                    (start, fresh) = (at + 1, true);
                }
            }
            b':' if braces == 0 => {
                let is_name = !head.is_empty()
                    && head.bytes().all(|b| b.is_ascii_alphanumeric() || b"_$%".contains(&b));
                if is_name && bytes.get(at + 1) != Some(&b':') {
                    found.push((first_line, Piece::Label(head)));
                    (start, fresh) = (at + 1, true);
                }
            }
            _ => {}
        }
        at += 1;
    }
    found
}

fn without_comments(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('/') {
        clean.push_str(&rest[..at]);
        rest = &rest[at..];
        if rest.starts_with("//") {
            rest = &rest[rest.find('\n').unwrap_or(rest.len())..];
        } else if rest.starts_with("/*") {
            let end = rest.find("*/").map_or(rest.len(), |end| end + 2);
            clean.extend(rest[..end].chars().filter(|&c| c == '\n'));
            rest = &rest[end..];
        } else {
            clean.push('/');
            rest = &rest[1..];
        }
    }
    clean.push_str(rest);
    clean
}

fn class_of(kind: &str) -> Option<Class> {
    Some(match kind {
        "pred" => Class::Pred,
        "b8" | "u8" | "s8" | "b16" | "u16" | "s16" | "f16" | "bf16" | "b32" | "u32" | "s32" | "f32"
        | "f16x2" | "bf16x2" => Class::Word,
        "b64" | "u64" | "s64" | "f64" => Class::Double,
        _ => return None,
    })
}

pub(crate) fn bytes_of(kind: &str) -> Option<u32> {
    Some(match kind {
        "b8" | "u8" | "s8" => 1,
        "b16" | "u16" | "s16" | "f16" | "bf16" => 2,
        "b32" | "u32" | "s32" | "f32" | "f16x2" | "bf16x2" => 4,
        "b64" | "u64" | "s64" | "f64" => 8,
        "b128" => 16,
        _ => return None,
    })
}

/// The bits of a number as PTX writes it, for a register of `class` (64 bits where it is wider than a word). Floats
/// come as `0f` and `0d`.
pub(crate) fn number(text: &str) -> Option<i128> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let digits = digits.strip_suffix('U').unwrap_or(digits);
    let value = if let Some(hex) = digits.strip_prefix("0f").or_else(|| digits.strip_prefix("0F")) {
        u32::from_str_radix(hex, 16).ok()? as i128
    } else if let Some(hex) = digits.strip_prefix("0d").or_else(|| digits.strip_prefix("0D")) {
        u64::from_str_radix(hex, 16).ok()? as i128
    } else if let Some(hex) = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        i128::from_str_radix(hex, 16).ok()?
    } else if let Some(bits) = digits.strip_prefix("0b") {
        i128::from_str_radix(bits, 2).ok()?
    } else {
        digits.parse().ok()?
    };
    Some(if negative { -value } else { value })
}

/// `.global .align 4 .u32 name[3] = {1, 2, 3}`; also a parameter.
fn variable(text: &str) -> Result<Variable, String> {
    let fail = || format!("declaration not understood: {text}");
    let (head, init) = match text.split_once('=') {
        Some((head, init)) => (head.trim(), Some(init.trim())),
        None => (text.trim(), None),
    };
    let mut space = Space::Global;
    let mut align = 0;
    let mut unit = 0;
    let mut vector = 1;
    let mut name = "";
    let mut words = head.split_whitespace();
    while let Some(word) = words.next() {
        match word {
            ".global" => space = Space::Global,
            ".const" => space = Space::Const,
            ".shared" => space = Space::Shared,
            ".local" => space = Space::Local,
            ".param" => space = Space::Param,
            ".align" => align = words.next().and_then(|n| n.parse().ok()).ok_or_else(fail)?,
            ".visible" | ".extern" | ".weak" | ".common" | ".ptr" => {}
            ".v2" => vector = 2,
            ".v4" => vector = 4,
            _ if word.starts_with('.') => {
                if let Some(bytes) = bytes_of(&word[1..]) {
                    unit = bytes;
                } else {
                    return Err(fail());
                }
            }
            _ => name = word,
        }
    }
    let mut count = 1;
    let mut open = false;
    let name = match name.split_once('[') {
        Some((name, dims)) => {
            for dim in dims.split('[') {
                let dim = dim.trim_end_matches(']');
                if dim.is_empty() {
                    open = true;
                } else {
                    count *= dim.parse::<u32>().map_err(|_| fail())?;
                }
            }
            name
        }
        None => name,
    };
    if name.is_empty() || unit == 0 {
        return Err(fail());
    }
    let mut data = Vec::new();
    if let Some(init) = init {
        let list = init.trim_start_matches('{').trim_end_matches('}');
        for value in list.split(',').map(str::trim).filter(|v| !v.is_empty()) {
            let value = number(value).ok_or_else(fail)?;
            data.extend_from_slice(&(value as i64 as u64).to_le_bytes()[..unit as usize]);
        }
    }
    let bytes = if open { 0 } else { unit * vector * count };
    Ok(Variable { name: name.to_string(), space, align: align.max(unit), bytes, init: data })
}

/// Splits at commas outside brackets.
fn split_operands(text: &str) -> Vec<&str> {
    let (mut depth, mut start) = (0, 0);
    let mut parts = Vec::new();
    for (at, c) in text.char_indices() {
        match c {
            '{' | '[' | '(' => depth += 1,
            '}' | ']' | ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(text[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    let last = text[start..].trim();
    if !last.is_empty() {
        parts.push(last);
    }
    parts
}

struct Scopes {
    /// Names of registers, innermost last.
    names: Vec<HashMap<String, Reg>>,
    /// Which block each is, for labels.
    ids: Vec<u32>,
    next_id: u32,
}

impl Scopes {
    fn find(&self, name: &str) -> Option<Reg> {
        self.names.iter().rev().find_map(|scope| scope.get(name).copied())
    }

    fn operand(&self, text: &str) -> Result<Operand, String> {
        let text = text.trim();
        let fail = || format!("operand not understood: {text}");
        if text == "_" {
            return Ok(Operand::Sink);
        }
        if let Some(inner) = text.strip_prefix('{') {
            let inner = inner.strip_suffix('}').ok_or_else(fail)?;
            let list: Result<Vec<_>, _> =
                split_operands(inner).into_iter().map(|t| self.operand(t)).collect();
            return Ok(Operand::Vector(list?));
        }
        if let Some(inner) = text.strip_prefix('(') {
            let inner = inner.strip_suffix(')').ok_or_else(fail)?;
            let list: Result<Vec<_>, _> =
                split_operands(inner).into_iter().map(|t| self.operand(t)).collect();
            return Ok(Operand::Vector(list?));
        }
        if let Some(inner) = text.strip_prefix('[') {
            let inner = inner.strip_suffix(']').ok_or_else(fail)?;
            let parts = split_operands(inner);
            let (first, others) = parts.split_first().ok_or_else(fail)?;
            let rest: Result<Vec<_>, _> = others.iter().map(|t| self.operand(t)).collect();
            let (base, offset) = match first.rfind(['+', '-']).filter(|&at| at > 0) {
                Some(at) => {
                    let sign = if first[at..].starts_with('-') { -1 } else { 1 };
                    let digits = first[at + 1..].trim();
                    let (sign, digits) = match digits.strip_prefix('-') {
                        Some(digits) => (-sign, digits),
                        None => (sign, digits),
                    };
                    let base = first[..at].trim().trim_end_matches('+').trim();
                    (base, sign * number(digits).ok_or_else(fail)? as i64)
                }
                None => (*first, 0),
            };
            return Ok(Operand::Address { base: Box::new(self.operand(base)?), offset, rest: rest? });
        }
        if let Some((a, b)) = text.split_once('|') {
            return Ok(Operand::Pair(Box::new(self.operand(a)?), Box::new(self.operand(b)?)));
        }
        if let Some(inner) = text.strip_prefix('!') {
            return self.find(inner.trim()).map(Operand::Not).ok_or_else(fail);
        }
        if let Some(reg) = self.find(text) {
            return Ok(Operand::Reg(reg));
        }
        if text.starts_with('%') {
            return Ok(Operand::Special(text.to_string()));
        }
        if text.starts_with(|c: char| c.is_ascii_digit() || c == '-') {
            number(text).ok_or_else(fail)?;
            return Ok(Operand::Number(text.to_string()));
        }
        Ok(Operand::Symbol(text.to_string()))
    }
}

fn list_of_params(text: &str) -> Result<Vec<Variable>, String> {
    split_operands(text).into_iter().map(variable).collect()
}

/// A function's head: its kind, name, results and parameters.
fn head(text: &str) -> Result<Function, String> {
    let fail = || format!("function not understood: {text}");
    let entry = text.contains(".entry");
    let rest = text.split_once(if entry { ".entry" } else { ".func" }).ok_or_else(fail)?.1.trim();
    // What a function returns stands before its name.
    let rest = match rest.strip_prefix('(') {
        Some(rest) => rest.split_once(')').ok_or_else(fail)?.1.trim(),
        None => rest,
    };
    let (name, rest) = match rest.split_once('(') {
        Some((name, rest)) => (name.trim(), rest),
        None => (rest, ")"),
    };
    let (params, _) = rest.split_once(')').ok_or_else(fail)?;
    // `.name x, y, z` in the head.
    let triple = |name: &str| {
        let list = text.split_once(name)?.1.split('.').next()?;
        let mut found = [1u32; 3];
        for (to, n) in found.iter_mut().zip(list.split(',')) {
            *to = n.trim().parse().ok()?;
        }
        Some(found)
    };
    let max_threads = triple(".maxntid").or(triple(".reqntid")).map_or(0, |n| n.iter().product());
    let cluster = triple(".reqnctapercluster").unwrap_or([1; 3]);
    Ok(Function {
        name: name.to_string(),
        entry,
        params: list_of_params(params)?,
        variables: Vec::new(),
        statements: Vec::new(),
        registers: [0; 3],
        max_threads,
        cluster,
    })
}

/// Takes a module's text apart.
///
/// # Errors
/// What was not understood, with its line.
pub(crate) fn parse(text: &str) -> Result<Text, String> {
    let clean = without_comments(text);
    let mut out = Text { variables: Vec::new(), functions: Vec::new() };
    let mut current: Option<Function> = None;
    let mut scopes = Scopes { names: Vec::new(), ids: Vec::new(), next_id: 0 };
    let mut labels: HashMap<(u32, String), u32> = HashMap::new();
    // Branches: statement, the blocks around it from outside inwards, the name.
    let mut branches: Vec<(usize, Vec<u32>, String)> = Vec::new();
    for (line, piece) in pieces(&clean) {
        let at = |why: String| format!("line {line}: {why}");
        match piece {
            Piece::Open(text) => {
                if current.is_none() {
                    current = Some(head(text).map_err(at)?);
                    labels.clear();
                    branches.clear();
                }
                scopes.names.push(HashMap::new());
                scopes.ids.push(scopes.next_id);
                scopes.next_id += 1;
            }
            Piece::Close => {
                scopes.names.pop();
                scopes.ids.pop();
                if scopes.ids.is_empty()
                    && let Some(mut function) = current.take()
                {
                    for (statement, around, name) in branches.drain(..) {
                        let target = around.iter().rev().find_map(|id| labels.get(&(*id, name.clone())));
                        let target = *target.ok_or_else(|| at(format!("no label {name}")))?;
                        function.statements[statement].target = Some(target);
                    }
                    out.functions.push(function);
                }
            }
            Piece::Label(name) => {
                if let (Some(function), Some(&id)) = (&current, scopes.ids.last()) {
                    labels.insert((id, name.to_string()), function.statements.len() as u32);
                }
            }
            Piece::Statement(text) => {
                let Some(function) = &mut current else {
                    if [".global", ".const", ".shared", ".extern", ".visible", ".weak", ".common"]
                        .iter()
                        .any(|d| text.starts_with(d))
                        && !text.contains(".func")
                    {
                        out.variables.push(variable(text).map_err(at)?);
                    }
                    continue;
                };
                if let Some(rest) = text.strip_prefix(".reg") {
                    let rest = rest.trim().strip_prefix('.').unwrap_or(rest);
                    let (kind, names) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
                    let class =
                        class_of(kind).ok_or_else(|| at(format!("registers of type {kind}: not known")))?;
                    let scope = scopes.names.last_mut().ok_or("a register outside a function")?;
                    for name in names.split(',').map(str::trim) {
                        let (stem, count) = match name.split_once('<') {
                            Some((stem, count)) => (
                                stem,
                                count.trim_end_matches('>').parse::<u32>().map_err(|e| at(e.to_string()))?,
                            ),
                            None => (name, u32::MAX),
                        };
                        let next = &mut function.registers[class as usize];
                        if count == u32::MAX {
                            scope.insert(stem.to_string(), Reg { class, index: *next });
                            *next += 1;
                        } else {
                            for i in 0..count {
                                scope.insert(format!("{stem}{i}"), Reg { class, index: *next + i });
                            }
                            *next += count;
                        }
                    }
                    continue;
                }
                if text.starts_with(".shared") || text.starts_with(".local") || text.starts_with(".param") {
                    function.variables.push(variable(text).map_err(at)?);
                    continue;
                }
                if text.starts_with('.') || text.is_empty() {
                    continue;
                }
                let mut rest = text;
                let mut guard = None;
                if let Some(guarded) = rest.strip_prefix('@') {
                    let (name, after) = guarded
                        .split_once(char::is_whitespace)
                        .ok_or_else(|| at(format!("guard without instruction: {text}")))?;
                    let (negated, name) = match name.strip_prefix('!') {
                        Some(name) => (true, name),
                        None => (false, name),
                    };
                    let reg = scopes.find(name).ok_or_else(|| at(format!("no predicate {name}")))?;
                    guard = Some((reg.index, negated));
                    rest = after.trim();
                }
                let (opcode, operands) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
                let opcode: Vec<String> = opcode.split('.').map(str::to_string).collect();
                let operands = if opcode[0] == "bra" {
                    branches.push((
                        function.statements.len(),
                        scopes.ids.clone(),
                        operands.trim().to_string(),
                    ));
                    Vec::new()
                } else {
                    let operands = split_operands(operands);
                    let list: Result<Vec<_>, _> =
                        operands.into_iter().map(|o| scopes.operand(o).map_err(at)).collect();
                    list?
                };
                function.statements.push(Statement { line, guard, opcode, operands, target: None });
            }
        }
    }
    Ok(out)
}
