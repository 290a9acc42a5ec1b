//! Reads pickles as data. Nothing in them is imported, called or made; only what is known to be harmless is accepted.

use std::collections::HashMap;

use crate::{Error, Result};

/// What a pickle may take, in bytes, for all that it puts on the stack, into the memo and into containers. A tensor
/// takes some 2 kB of it.
const BUDGET: usize = 40 << 20;

/// A value; text and bytes are parts of the file, and containers are entries of [`Pickle::objects`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(&'a str),
    /// Bytes, text that is no UTF-8, or an integer of more than 64 bits.
    Bytes(&'a [u8]),
    Object(usize),
}

/// What values share and what may contain itself.
#[derive(Debug, PartialEq)]
pub enum Object<'a> {
    Tuple(Box<[Value<'a>]>),
    List(Vec<Value<'a>>),
    /// A dict, or an `OrderedDict`.
    Dict(Vec<(Value<'a>, Value<'a>)>),
    Set,
    /// A function or class, by module and name.
    Global(&'a str, &'a str),
    /// What a global would have returned for these arguments, had it been called.
    Call(usize, Value<'a>),
    /// What the file has outside of the pickle.
    Persistent(Value<'a>),
}

/// What one pickle says.
#[derive(Debug)]
pub struct Pickle<'a> {
    pub root: Value<'a>,
    pub objects: Vec<Object<'a>>,
    /// The bytes that come after it.
    pub rest: &'a [u8],
}

impl<'a> Pickle<'a> {
    /// Reads the pickle at the start of `bytes`, of any protocol from 2 on.
    ///
    /// Fails with [`Error::Data`] at the first global that is not `known`, at an operation that only programs need,
    /// if the pickle is damaged, and if it would take more than 40 MiB.
    pub fn read(bytes: &'a [u8], known: &dyn Fn(&str, &str) -> bool) -> Result<Self> {
        let mut machine = Machine { rest: bytes, ..Machine::default() };
        while !machine.step(known)? {}
        let root = machine.pop()?;
        Ok(Self { root, objects: machine.objects, rest: machine.rest })
    }

    /// The object that a value stands for, if it is one.
    pub fn object(&self, value: Value) -> Option<&Object<'a>> {
        match value {
            Value::Object(index) => self.objects.get(index),
            _ => None,
        }
    }

    /// The items of a tuple or list.
    pub fn items(&self, value: Value) -> Option<&[Value<'a>]> {
        match self.object(value)? {
            Object::Tuple(items) => Some(items),
            Object::List(items) => Some(items),
            _ => None,
        }
    }
}

/// At most 80 characters of a text from a file, none of which a terminal would obey.
pub fn shown(text: &str) -> String {
    let escaped: String = text.chars().take(80).flat_map(char::escape_debug).collect();
    if text.chars().nth(80).is_some() { escaped + "…" } else { escaped }
}

/// The pickle machine of CPython's `pickletools`.
#[derive(Default)]
struct Machine<'a> {
    rest: &'a [u8],
    stack: Vec<Value<'a>>,
    /// The heights of the stack at which marks were set.
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    objects: Vec<Object<'a>>,
    highest: usize,
    spent: usize,
}

const VALUE: usize = size_of::<Value>();

impl<'a> Machine<'a> {
    /// Does one operation. Returns whether it was the last.
    fn step(&mut self, known: &dyn Fn(&str, &str) -> bool) -> Result<bool> {
        match self.byte()? {
            b'.' => return Ok(true),
            // PROTO, FRAME
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),

            b'N' => self.push(Value::None)?,
            0x88 => self.push(Value::Bool(true))?,
            0x89 => self.push(Value::Bool(false))?,
            b'K' => self.integer(1, false)?,
            b'M' => self.integer(2, false)?,
            b'J' => self.integer(4, true)?,
            // LONG1, LONG4
            0x8a => {
                let len = self.length(1)?;
                self.integer(len, true)?;
            }
            0x8b => {
                let len = self.length(4)?;
                self.integer(len, true)?;
            }
            b'G' => {
                let bytes = self.take(8)?.try_into().expect("eight bytes were taken");
                self.push(Value::Float(f64::from_be_bytes(bytes)))?;
            }
            // BINUNICODE and BINSTRING with lengths of one, four and eight bytes, then the same for bytes
            0x8c | b'U' => self.text(1)?,
            b'X' | b'T' => self.text(4)?,
            0x8d => self.text(8)?,
            b'C' => self.bytes(1)?,
            b'B' => self.bytes(4)?,
            0x8e => self.bytes(8)?,

            b'(' => {
                self.spend(2 * size_of::<usize>())?;
                self.marks.push(self.stack.len());
            }
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_to_mark()?),
            b'2' => {
                let top = self.top()?;
                self.push(top)?;
            }

            b')' => self.tuple(Vec::new())?,
            0x85 => self.tuple_of(1)?,
            0x86 => self.tuple_of(2)?,
            0x87 => self.tuple_of(3)?,
            b't' => {
                let items = self.pop_to_mark()?;
                self.tuple(items)?;
            }
            b']' => self.object(Object::List(Vec::new()))?,
            b'l' => {
                let items = self.pop_to_mark()?;
                self.object(Object::List(Vec::new()))?;
                self.append(items)?;
            }
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.append(items)?;
            }
            b'}' => self.object(Object::Dict(Vec::new()))?,
            b'd' => {
                let items = self.pop_to_mark()?;
                self.object(Object::Dict(Vec::new()))?;
                self.set_items(&items)?;
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set_items(&[key, value])?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(&items)?;
            }
            // EMPTY_SET, ADDITEMS, FROZENSET: no part of tensors, so the items are left out
            0x8f => self.object(Object::Set)?,
            0x90 => drop(self.pop_to_mark()?),
            0x91 => {
                self.pop_to_mark()?;
                self.object(Object::Set)?;
            }

            b'q' => {
                let id = self.length(1)?;
                self.remember(id)?;
            }
            b'r' => {
                let id = self.length(4)?;
                self.remember(id)?;
            }
            0x94 => self.remember(self.memo.len())?,
            b'h' => {
                let id = self.length(1)?;
                self.recall(id)?;
            }
            b'j' => {
                let id = self.length(4)?;
                self.recall(id)?;
            }

            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(module, name, known)?;
            }
            0x93 => match (self.pop()?, self.pop()?) {
                (Value::Text(name), Value::Text(module)) => self.global(module, name, known)?,
                (name, module) => {
                    bail!(Data, "a global of the pickle is named by {module:?} and {name:?}, expected texts")
                }
            },
            // REDUCE, NEWOBJ
            operation @ (b'R' | 0x81) => {
                let (args, callable) = (self.pop()?, self.pop()?);
                self.call(callable, args, operation)?;
            }
            // NEWOBJ_EX: keyword arguments are left out, as no global has any that is of use here
            operation @ 0x92 => {
                let (_, args, callable) = (self.pop()?, self.pop()?, self.pop()?);
                self.call(callable, args, operation)?;
            }
            // BUILD: the attributes of a dict, or the contents of what is not looked into
            b'b' => {
                self.pop()?;
                let top = self.top()?;
                if !matches!(self.at(top), Some(Object::Dict(_) | Object::Call(..))) {
                    bail!(Data, "the pickle sets attributes of {}", self.told(top));
                }
            }
            b'Q' => {
                let id = self.pop()?;
                self.object(Object::Persistent(id))?;
            }
            other => bail!(Data, "the pickle has the operation {other:#04x}, which no state dict needs"),
        }
        Ok(false)
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let Some((taken, rest)) = self.rest.split_at_checked(n) else {
            bail!(Data, "the pickle ends within an operation that takes {n} more bytes")
        };
        self.rest = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8> {
        match self.rest.split_first() {
            Some((byte, rest)) => {
                self.rest = rest;
                Ok(*byte)
            }
            None => bail!(Data, "the pickle ends before its last operation"),
        }
    }

    /// An unsigned number of `n` bytes.
    fn length(&mut self, n: usize) -> Result<usize> {
        let number = self.take(n)?.iter().rev().fold(0u64, |number, byte| number << 8 | u64::from(*byte));
        usize::try_from(number).map_err(|_| Error::Data(format!("the pickle has a length of {number} bytes")))
    }

    /// A line without its end.
    fn line(&mut self) -> Result<&'a str> {
        let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') else {
            bail!(Data, "the pickle ends within a name")
        };
        let line = self.take(end + 1)?;
        let line = std::str::from_utf8(&line[..end]);
        line.map_err(|_| Error::Data("the pickle has a name that is not UTF-8".into()))
    }

    fn spend(&mut self, bytes: usize) -> Result<()> {
        self.spent += bytes;
        if self.spent > BUDGET {
            bail!(Data, "the pickle takes more than {} MiB without its tensors", BUDGET >> 20);
        }
        Ok(())
    }

    fn push(&mut self, value: Value<'a>) -> Result<()> {
        self.stack.push(value);
        if self.stack.len() > self.highest {
            self.highest = self.stack.len();
            self.spend(2 * VALUE)?;
        }
        Ok(())
    }

    fn pop(&mut self) -> Result<Value<'a>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.pop() {
            Some(value) if self.stack.len() >= floor => Ok(value),
            _ => bail!(Data, "the pickle takes a value from its stack where there is none"),
        }
    }

    fn top(&mut self) -> Result<Value<'a>> {
        let top = self.pop()?;
        self.stack.push(top);
        Ok(top)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Value<'a>>> {
        match self.marks.pop() {
            Some(mark) => Ok(self.stack.split_off(mark)),
            None => bail!(Data, "the pickle goes back to a mark that it has not set"),
        }
    }

    /// Pushes a little-endian integer of `n` bytes.
    fn integer(&mut self, n: usize, signed: bool) -> Result<()> {
        let bytes = self.take(n)?;
        if n > 8 {
            return self.push(Value::Bytes(bytes));
        }
        let fill = if signed && bytes.last().is_some_and(|last| *last > 127) { 255 } else { 0 };
        let mut whole = [fill; 8];
        whole[..n].copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(whole)))
    }

    /// Pushes bytes whose number is in the `n` bytes before them.
    fn bytes(&mut self, n: usize) -> Result<()> {
        let len = self.length(n)?;
        let bytes = self.take(len)?;
        self.push(Value::Bytes(bytes))
    }

    fn text(&mut self, n: usize) -> Result<()> {
        let len = self.length(n)?;
        let bytes = self.take(len)?;
        self.push(std::str::from_utf8(bytes).map_or(Value::Bytes(bytes), Value::Text))
    }

    /// Pushes a new object.
    fn object(&mut self, object: Object<'a>) -> Result<()> {
        self.spend(2 * size_of::<Object>())?;
        self.objects.push(object);
        self.push(Value::Object(self.objects.len() - 1))
    }

    fn tuple(&mut self, items: Vec<Value<'a>>) -> Result<()> {
        self.spend(items.len() * VALUE)?;
        self.object(Object::Tuple(items.into()))
    }

    fn tuple_of(&mut self, n: usize) -> Result<()> {
        let mut items = (0..n).map(|_| self.pop()).collect::<Result<Vec<_>>>()?;
        items.reverse();
        self.tuple(items)
    }

    fn at(&mut self, value: Value) -> Option<&mut Object<'a>> {
        match value {
            Value::Object(index) => self.objects.get_mut(index),
            _ => None,
        }
    }

    /// A value in words.
    fn told(&mut self, value: Value<'a>) -> String {
        match self.at(value) {
            Some(Object::Global(module, name)) => format!("{}.{}", shown(module), shown(name)),
            Some(Object::Tuple(_)) => "a tuple".into(),
            Some(Object::List(_)) => "a list".into(),
            Some(Object::Dict(_)) => "a dict".into(),
            Some(_) => "an object".into(),
            None => "a plain value".into(),
        }
    }

    /// Adds items to the list on top.
    fn append(&mut self, items: Vec<Value<'a>>) -> Result<()> {
        // A vector starts with room for four.
        self.spend((2 * items.len()).max(4) * VALUE)?;
        let top = self.top()?;
        match self.at(top) {
            Some(Object::List(list)) => list.extend(items),
            _ => bail!(Data, "the pickle appends to {}, expected a list", self.told(top)),
        }
        Ok(())
    }

    /// Adds keys and values to the dict on top.
    fn set_items(&mut self, items: &[Value<'a>]) -> Result<()> {
        self.spend((2 * items.len()).max(8) * VALUE)?;
        let top = self.top()?;
        match self.at(top) {
            Some(Object::Dict(dict)) if items.len().is_multiple_of(2) => {
                dict.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
            }
            Some(Object::Dict(_)) => bail!(Data, "the pickle has a key without a value"),
            _ => bail!(Data, "the pickle sets items of {}, expected a dict", self.told(top)),
        }
        Ok(())
    }

    fn remember(&mut self, id: usize) -> Result<()> {
        // With its share of a table that was just doubled.
        self.spend(4 * size_of::<(u32, Value)>())?;
        let top = self.top()?;
        let id = u32::try_from(id).expect("numbers in the memo have four bytes, and its budget ends sooner");
        self.memo.insert(id, top);
        Ok(())
    }

    fn recall(&mut self, id: usize) -> Result<()> {
        match u32::try_from(id).ok().and_then(|id| self.memo.get(&id)) {
            Some(&value) => self.push(value),
            None => bail!(Data, "the pickle recalls value {id}, which it has not remembered"),
        }
    }

    fn global(&mut self, module: &'a str, name: &'a str, known: &dyn Fn(&str, &str) -> bool) -> Result<()> {
        if !known(module, name) {
            bail!(
                Data,
                "the pickle asks for {}.{}, Python code that is no part of a state dict; nothing of it was run \
                 (docs/convert.md has a script that saves the state dict of such a file)",
                shown(module),
                shown(name)
            );
        }
        self.object(Object::Global(module, name))
    }

    /// Notes what is called with what. An `OrderedDict` is a dict.
    fn call(&mut self, callable: Value<'a>, args: Value<'a>, operation: u8) -> Result<()> {
        match (self.at(callable), callable) {
            (Some(Object::Global("collections", "OrderedDict")), _) if operation == b'R' => {
                self.object(Object::Dict(Vec::new()))?;
                self.pairs(args)
            }
            (Some(Object::Global(..)), Value::Object(index)) => self.object(Object::Call(index, args)),
            _ => bail!(Data, "the pickle calls {}, expected a function or class", self.told(callable)),
        }
    }

    /// Adds the arguments of an `OrderedDict`, which old Pythons wrote as one list of pairs, to the dict on top.
    fn pairs(&mut self, args: Value<'a>) -> Result<()> {
        let items = |machine: &mut Self, value| match machine.at(value) {
            Some(Object::Tuple(items)) => Some(items.to_vec()),
            Some(Object::List(items)) => Some(items.clone()),
            _ => None,
        };
        let list = match items(self, args).as_deref() {
            Some([]) => return Ok(()),
            Some(&[list]) => items(self, list),
            _ => None,
        };
        let faulty = || Error::Data("the pickle makes an OrderedDict of something other than pairs".into());
        for pair in list.ok_or_else(faulty)? {
            match items(self, pair).as_deref() {
                Some(pair @ [_, _]) => self.set_items(pair)?,
                _ => return Err(faulty()),
            }
        }
        Ok(())
    }
}
