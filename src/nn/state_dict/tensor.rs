//! A tensor that still is in its file.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use safetensors::Dtype;

use crate::{Error, Result};

/// A file of which parts are read.
pub struct Bytes {
    path: PathBuf,
    file: File,
    len: u64,
}

impl Bytes {
    /// Opens a file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        let len = file.metadata().map_err(Error::io(path))?.len();
        Ok(Self { path: path.to_owned(), file, len })
    }

    /// How many there are.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The `len` bytes from `start` on. Fails with [`Error::Data`] if the file ends before them.
    pub fn read(&mut self, start: u64, len: usize) -> Result<Vec<u8>> {
        if start.checked_add(len as u64).is_none_or(|end| end > self.len) {
            bail!(Data, "ends after {} bytes, within the {len} from byte {start} on", self.len);
        }
        let mut bytes = vec![0; len];
        let read = self.file.seek(SeekFrom::Start(start)).and_then(|_| self.file.read_exact(&mut bytes));
        read.map_err(Error::io(&self.path))?;
        Ok(bytes)
    }
}

/// Where the numbers of a tensor are in its file, and what they are.
///
/// Whoever makes one has found that [`Self::span`] elements are in the file.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredTensor {
    /// The type of the numbers.
    pub dtype: Dtype,
    /// The extent of each dimension.
    pub shape: Vec<usize>,
    /// For each dimension, how many elements its next index is away.
    pub strides: Vec<usize>,
    /// The first element, in bytes from the start of the file.
    pub start: u64,
}

impl StoredTensor {
    /// A tensor in row-major order, without gaps.
    pub fn contiguous(dtype: Dtype, shape: Vec<usize>, start: u64) -> Self {
        let mut strides = vec![1usize; shape.len()];
        for i in (1..shape.len()).rev() {
            strides[i - 1] = strides[i].saturating_mul(shape[i]);
        }
        Self { dtype, shape, strides, start }
    }

    /// Bytes of an element; 0 for the types that share bytes.
    pub fn element_size(&self) -> usize {
        self.dtype.bitsize() / 8
    }

    /// The number of elements; `None` if it is beyond all numbers.
    pub fn len(&self) -> Option<usize> {
        self.shape.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim))
    }

    /// How many elements lie from the first to the last; `None` if that is beyond all numbers.
    pub fn span(&self) -> Option<usize> {
        if self.len()? == 0 {
            return Some(0);
        }
        let reach =
            |sum: usize, (dim, stride): (&usize, &usize)| sum.checked_add((dim - 1).checked_mul(*stride)?);
        self.shape.iter().zip(&self.strides).try_fold(0, reach)?.checked_add(1)
    }

    /// Whether two indices lead to the same element, as in a tensor that was expanded.
    pub fn overlaps(&self) -> bool {
        let mut dims: Vec<_> = self.strides.iter().zip(&self.shape).filter(|(_, dim)| **dim > 1).collect();
        dims.sort_unstable();
        let mut reach = 0usize;
        self.len() != Some(0)
            && dims.into_iter().any(|(&stride, dim)| {
                let overlaps = stride <= reach;
                reach = reach.saturating_add((dim - 1).saturating_mul(stride));
                overlaps
            })
    }

    /// The bytes of the elements in row-major order.
    pub fn read(&self, file: &mut Bytes) -> Result<Vec<u8>> {
        let (size, len, span) = (self.element_size(), self.len().unwrap_or(0), self.span().unwrap_or(0));
        let bytes = file.read(self.start, span * size)?;
        if self.is_row_major() {
            return Ok(bytes);
        }
        let mut ordered = Vec::with_capacity(len * size);
        for i in 0..len {
            let (mut left, mut at) = (i, 0);
            for (dim, stride) in self.shape.iter().zip(&self.strides).rev() {
                at += left % dim * stride;
                left /= dim;
            }
            ordered.extend_from_slice(&bytes[at * size..][..size]);
        }
        Ok(ordered)
    }

    fn is_row_major(&self) -> bool {
        let plain = Self::contiguous(self.dtype, self.shape.clone(), 0).strides;
        self.shape.iter().zip(self.strides.iter().zip(&plain)).all(|(dim, (a, b))| *dim <= 1 || a == b)
    }
}
