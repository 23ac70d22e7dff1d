//! Strided matrix products on the `gemm` crate, single-threaded: callers parallelise over tiles, so results do
//! not depend on the number of threads.

use crate::element::Real;

/// A read-only strided matrix; strides in elements.
#[derive(Clone, Copy)]
pub struct Mat<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

/// A writable row-major matrix; `row_stride` in elements.
pub struct MatMut<'a, T> {
    data: &'a mut [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

fn fits(len: usize, rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> bool {
    rows == 0 || cols == 0 || (rows - 1) * row_stride + (cols - 1) * col_stride < len
}

impl<'a, T> Mat<'a, T> {
    /// Row-major `rows x cols` with `row_stride` elements between rows. Panics where `data` is too short.
    pub fn new(data: &'a [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(
            fits(data.len(), rows, cols, row_stride, 1),
            "matrix {rows}x{cols} with row stride {row_stride} does not fit {} elements",
            data.len()
        );
        Mat { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// Contiguous row-major `rows x cols`.
    pub fn packed(data: &'a [T], rows: usize, cols: usize) -> Self {
        Mat::new(data, rows, cols, cols)
    }

    /// The transpose, without copying.
    pub fn t(self) -> Self {
        Mat {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

impl<'a, T> MatMut<'a, T> {
    /// Row-major `rows x cols` with `row_stride` elements between rows. Panics where `data` is too short or rows
    /// would overlap.
    pub fn new(data: &'a mut [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(
            fits(data.len(), rows, cols, row_stride, 1) && (rows <= 1 || row_stride >= cols),
            "matrix {rows}x{cols} with row stride {row_stride} does not fit {} elements",
            data.len()
        );
        MatMut { data, rows, cols, row_stride }
    }

    /// Contiguous row-major `rows x cols`.
    pub fn packed(data: &'a mut [T], rows: usize, cols: usize) -> Self {
        MatMut::new(data, rows, cols, cols)
    }
}

/// `dst = scale * lhs * rhs`. Panics where the shapes do not agree.
pub fn multiply<T: Real>(dst: MatMut<'_, T>, scale: T, lhs: Mat<'_, T>, rhs: Mat<'_, T>) {
    product(dst, false, scale, lhs, rhs);
}

/// `dst += scale * lhs * rhs`. Panics where the shapes do not agree.
pub fn multiply_add<T: Real>(dst: MatMut<'_, T>, scale: T, lhs: Mat<'_, T>, rhs: Mat<'_, T>) {
    product(dst, true, scale, lhs, rhs);
}

fn product<T: Real>(dst: MatMut<'_, T>, accumulate: bool, scale: T, lhs: Mat<'_, T>, rhs: Mat<'_, T>) {
    assert!(
        dst.rows == lhs.rows && dst.cols == rhs.cols && lhs.cols == rhs.rows,
        "{}x{} = {}x{} * {}x{} does not agree",
        dst.rows,
        dst.cols,
        lhs.rows,
        lhs.cols,
        rhs.rows,
        rhs.cols
    );
    if dst.rows == 0 || dst.cols == 0 {
        return;
    }
    if lhs.cols == 0 {
        if !accumulate {
            for row in 0..dst.rows {
                dst.data[row * dst.row_stride..][..dst.cols].fill(T::ZERO);
            }
        }
        return;
    }
    // SAFETY: the constructors proved that every element addressed by (rows, cols, strides) lies inside its
    // slice; dst is borrowed uniquely, so it overlaps neither operand, and its rows do not overlap each other.
    unsafe {
        gemm::gemm(
            dst.rows,
            dst.cols,
            lhs.cols,
            dst.data.as_mut_ptr(),
            1,
            dst.row_stride as isize,
            accumulate,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            T::ONE,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;

    #[test]
    fn strided_products_match_loops() {
        let mut rng = SplitMix64::new(1);
        let (m, n, k) = (5, 7, 3);
        let a: Vec<f64> = (0..m * 4).map(|_| rng.normal()).collect();
        let b: Vec<f64> = (0..n * 6).map(|_| rng.normal()).collect();
        let start: Vec<f64> = (0..m * 9).map(|_| rng.normal()).collect();
        let mut dst = start.clone();
        multiply_add(MatMut::new(&mut dst, m, n, 9), 0.5, Mat::new(&a, m, k, 4), Mat::new(&b, n, k, 6).t());
        for i in 0..m {
            for j in 0..9 {
                let dot: f64 = if j < n { (0..k).map(|l| a[i * 4 + l] * b[j * 6 + l]).sum() } else { 0.0 };
                assert!((dst[i * 9 + j] - start[i * 9 + j] - 0.5 * dot).abs() < 1e-12);
            }
        }
        multiply(MatMut::new(&mut dst, m, n, 9), 1.0, Mat::new(&a, m, 0, 4), Mat::new(&b, n, 0, 6).t());
        assert!((0..m).all(|i| dst[i * 9..i * 9 + n].iter().all(|x| *x == 0.0)));
    }

    #[test]
    #[should_panic(expected = "does not fit")]
    fn a_matrix_larger_than_its_slice_is_refused() {
        let data = [0f32; 11];
        let _ = Mat::packed(&data, 3, 4);
    }
}
