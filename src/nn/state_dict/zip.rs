//! Where the records of a zip archive are that `torch.save` wrote: stored, not compressed, so that no record is more
//! than the file holds.

use std::collections::BTreeMap;

use super::{pickle::shown, tensor::Bytes};
use crate::Result;

/// More than any network has tensors.
const MOST_RECORDS: u64 = 100_000;

/// The first byte and the length of a record.
pub type Record = (u64, u64);

/// The little-endian number of `len` bytes at `at`.
fn number(header: &[u8], at: usize, len: usize) -> u64 {
    header[at..at + len].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// All records by name. Fails with [`Error::Data`](crate::Error::Data) if the archive is damaged, or if a record is
/// compressed or encrypted.
pub fn records(file: &mut Bytes) -> Result<BTreeMap<String, Record>> {
    let (count, start, len) = directory(file)?;
    if count > MOST_RECORDS || len > file.len() {
        bail!(Data, "is a zip archive of {count} records, expected at most {MOST_RECORDS}");
    }
    let directory = file.read(start, len as usize)?;
    let (mut rest, mut records) = (directory.as_slice(), BTreeMap::new());
    for _ in 0..count {
        let Some((header, after)) =
            rest.split_at_checked(46).filter(|(header, _)| header.starts_with(b"PK\x01\x02"))
        else {
            bail!(Data, "the directory of the zip archive is damaged")
        };
        let lens = [28, 30, 32].map(|at| number(header, at, 2) as usize);
        let Some((names, next)) = after.split_at_checked(lens.iter().sum()) else {
            bail!(Data, "the directory of the zip archive ends within a record")
        };
        let name = String::from_utf8_lossy(&names[..lens[0]]).into_owned();
        if number(header, 8, 2) & 1 != 0 || number(header, 10, 2) != 0 {
            bail!(Data, "record {} is compressed or encrypted, which PyTorch's are not", shown(&name));
        }
        let [packed, len, local] = long_numbers(header, &names[lens[0]..lens[0] + lens[1]]);
        let header = file.read(local, 30)?;
        if packed != len || !header.starts_with(b"PK\x03\x04") {
            bail!(Data, "record {} of the zip archive is damaged", shown(&name));
        }
        let start = local + 30 + number(&header, 26, 2) + number(&header, 28, 2);
        if start.checked_add(len).is_none_or(|end| end > file.len()) {
            bail!(Data, "record {} of the zip archive ends after the file", shown(&name));
        }
        if records.insert(name.clone(), (start, len)).is_some() {
            bail!(Data, "the zip archive has two records {}", shown(&name));
        }
        rest = next;
    }
    Ok(records)
}

/// The number of records, and the first byte and the length of the directory.
fn directory(file: &mut Bytes) -> Result<(u64, u64, u64)> {
    // It is followed by a comment of up to 65,535 bytes.
    let tail_len = file.len().min(22 + 65_535);
    let tail_start = file.len() - tail_len;
    let tail = file.read(tail_start, tail_len as usize)?;
    let Some(at) = tail.windows(22).rposition(|end| end.starts_with(b"PK\x05\x06")) else {
        bail!(Data, "is a zip archive without its end")
    };
    let long = at.checked_sub(20).map(|at| &tail[at..]).filter(|locator| locator.starts_with(b"PK\x06\x07"));
    let Some(locator) = long else {
        let end = &tail[at..];
        return Ok((number(end, 10, 2), number(end, 16, 4), number(end, 12, 4)));
    };
    let end = file.read(number(locator, 8, 8), 56)?;
    if !end.starts_with(b"PK\x06\x06") {
        bail!(Data, "is a zip archive whose end is damaged");
    }
    Ok((number(&end, 32, 8), number(&end, 48, 8), number(&end, 40, 8)))
}

/// Compressed and real length and the place of the local header. Those with no room in the header are in the extra
/// field 1, in the order of: real, compressed, place.
fn long_numbers(header: &[u8], mut extra: &[u8]) -> [u64; 3] {
    let mut long: &[u8] = &[];
    while extra.len() >= 4 {
        let (id, len) = (number(extra, 0, 2), number(extra, 2, 2) as usize);
        let field = extra.get(4..4 + len).unwrap_or_default();
        if id == 1 {
            long = field;
        }
        extra = extra.get(4 + len..).unwrap_or_default();
    }
    let mut numbers = [20, 24, 42].map(|at| number(header, at, 4));
    for i in [1, 0, 2] {
        if let (0xffff_ffff, Some((first, rest))) = (numbers[i], long.split_at_checked(8)) {
            (numbers[i], long) = (number(first, 0, 8), rest);
        }
    }
    numbers
}
