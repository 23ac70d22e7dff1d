//! Clips as animated GIFs: one palette for the whole clip, so that still parts do not flicker.

use crate::data::Video;
use crate::durable::{Disk, RealDisk, write_file};
use ::gif::{Encoder, Frame, Repeat};
use std::borrow::Cow;
use std::io::{self, Write};
use std::path::Path;

/// Colours are looked up by 5 bits of each channel.
const BITS: u32 = 5;

/// Writes a clip to `path`, looping, `fps` pictures a second (GIF counts in hundredths of a second), each pixel
/// enlarged to `zoom` x `zoom`. The file appears whole or not at all.
///
/// # Errors
/// The disk's; `InvalidInput` for a clip without pixels, wider or taller than 65,535, or of the wrong length.
pub fn write(path: &Path, video: &Video, fps: u16, zoom: usize) -> io::Result<()> {
    write_on(&RealDisk, path, video, fps, zoom)
}

fn write_on(disk: &dyn Disk, path: &Path, video: &Video, fps: u16, zoom: usize) -> io::Result<()> {
    write_file(disk, path, |out| encode(out, video, fps, zoom))
}

fn encode<W: Write>(out: &mut W, video: &Video, fps: u16, zoom: usize) -> io::Result<()> {
    let (h, w, zoom) = (video.height, video.width, zoom.max(1));
    let side = |n: usize| u16::try_from(n * zoom).ok().filter(|n| *n > 0);
    let (Some(height), Some(width)) = (side(h), side(w)) else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a GIF of {h} x {w} pixels enlarged {zoom} times; allowed: 1 to 65535 a side"),
        ));
    };
    if video.rgb.len() != video.frames * h * w * 3 || video.frames == 0 {
        let message = format!("{} bytes for [{}, {h}, {w}, 3]", video.rgb.len(), video.frames);
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let (palette, index_of) = quantise(&video.rgb);
    let mut encoder = Encoder::new(out, width, height, &palette).map_err(to_io)?;
    encoder.set_repeat(Repeat::Infinite).map_err(to_io)?;
    let delay = (100.0 / f64::from(fps.max(1))).round().max(1.0) as u16;
    for frame in video.rgb.chunks_exact(h * w * 3) {
        let small: Vec<u8> = frame.chunks_exact(3).map(|p| index_of[cell(p)]).collect();
        let mut pixels = Vec::with_capacity(small.len() * zoom * zoom);
        for row in small.chunks_exact(w) {
            let wide: Vec<u8> = row.iter().flat_map(|x| std::iter::repeat_n(*x, zoom)).collect();
            (0..zoom).for_each(|_| pixels.extend_from_slice(&wide));
        }
        let frame = Frame { width, height, delay, buffer: Cow::Owned(pixels), ..Frame::default() };
        encoder.write_frame(&frame).map_err(to_io)?;
    }
    Ok(())
}

fn to_io(error: ::gif::EncodingError) -> io::Error {
    match error {
        ::gif::EncodingError::Io(e) => e,
        other => io::Error::other(other),
    }
}

fn cell(p: &[u8]) -> usize {
    let part = |x: u8| usize::from(x >> (8 - BITS));
    part(p[0]) << (2 * BITS) | part(p[1]) << BITS | part(p[2])
}

/// Median cut over the clip's colours: a palette of at most 256 RGB entries, and the entry of each cell.
fn quantise(rgb: &[u8]) -> (Vec<u8>, Vec<u8>) {
    // For each cell that occurs: pixels, and the sums of their channels.
    let mut cells = vec![(0u64, [0u64; 3]); 1 << (3 * BITS)];
    for p in rgb.chunks_exact(3) {
        let (count, sums) = &mut cells[cell(p)];
        *count += 1;
        sums.iter_mut().zip(p).for_each(|(s, x)| *s += u64::from(*x));
    }
    let mean = |i: usize, c: usize| cells[i].1[c] as f64 / cells[i].0 as f64;
    let used: Vec<usize> = (0..cells.len()).filter(|i| cells[*i].0 > 0).collect();
    // Splits the box with the largest squared error along its worst channel, at that channel's mean.
    let spread = |b: &[usize]| -> (f64, usize, f64) {
        (0..3)
            .map(|c| {
                let n: f64 = b.iter().map(|i| cells[*i].0 as f64).sum();
                let m = b.iter().map(|i| cells[*i].0 as f64 * mean(*i, c)).sum::<f64>() / n;
                let e = b.iter().map(|i| cells[*i].0 as f64 * (mean(*i, c) - m).powi(2)).sum::<f64>();
                (e, c, m)
            })
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .expect("three channels")
    };
    let mut boxes: Vec<((f64, usize, f64), Vec<usize>)> = vec![(spread(&used), used)];
    while boxes.len() < 256 {
        let (at, worst) = boxes
            .iter()
            .enumerate()
            .map(|(i, b)| (i, b.0.0))
            .max_by(|a, b| a.1.total_cmp(&b.1))
            .expect("one box or more");
        if worst <= 1e-9 {
            break;
        }
        let ((_, c, m), members) = boxes.swap_remove(at);
        let (low, high): (Vec<usize>, Vec<usize>) = members.into_iter().partition(|i| mean(*i, c) < m);
        for part in [low, high] {
            boxes.push((spread(&part), part));
        }
    }
    let mut palette = Vec::with_capacity(768);
    let mut index_of = vec![0u8; cells.len()];
    for (entry, (_, members)) in boxes.iter().enumerate() {
        let n: u64 = members.iter().map(|i| cells[*i].0).sum();
        for c in 0..3 {
            let sum: u64 = members.iter().map(|i| cells[*i].1[c]).sum();
            palette.push(((sum + n / 2) / n) as u8);
        }
        members.iter().for_each(|i| index_of[*i] = entry as u8);
    }
    (palette, index_of)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> (Vec<Vec<u8>>, u16, u16, u16) {
        let mut options = ::gif::DecodeOptions::new();
        options.set_color_output(::gif::ColorOutput::RGBA);
        let mut decoder = options.read_info(bytes).unwrap();
        let (w, h) = (decoder.width(), decoder.height());
        let (mut frames, mut delay) = (Vec::new(), 0);
        while let Some(frame) = decoder.read_next_frame().unwrap() {
            delay = frame.delay;
            frames.push(frame.buffer.chunks_exact(4).flat_map(|p| p[..3].to_vec()).collect());
        }
        (frames, w, h, delay)
    }

    #[test]
    fn few_colours_come_back_exactly_and_enlarged() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.gif");
        let rgb = vec![255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9, 200, 100, 50, 255, 255, 255];
        let v = Video { frames: 3, height: 1, width: 2, rgb };
        write(&path, &v, 10, 2).unwrap();
        let (frames, w, h, delay) = read(&std::fs::read(&path).unwrap());
        assert_eq!((frames.len(), w, h, delay), (3, 4, 2, 10));
        assert_eq!(frames[0], [255, 0, 0, 255, 0, 0, 0, 255, 0, 0, 255, 0].repeat(2));
    }

    #[test]
    fn scenes_are_close_in_colour() {
        let v = crate::data::procedural::Scene::new(1, 3).render(6, 48, 48);
        let mut out = Vec::new();
        encode(&mut out, &v, 12, 1).unwrap();
        let (frames, ..) = read(&out);
        let error: f64 =
            frames.concat().iter().zip(&v.rgb).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
        let rms = (error / v.rgb.len() as f64).sqrt();
        assert!(rms < 6.0, "{rms}");
    }

    #[test]
    fn impossible_clips_are_errors() {
        for v in [
            Video { frames: 1, height: 0, width: 2, rgb: vec![] },
            Video { frames: 1, height: 2, width: 2, rgb: vec![0; 3] },
            Video { frames: 0, height: 2, width: 2, rgb: vec![] },
        ] {
            assert_eq!(encode(&mut Vec::new(), &v, 8, 1).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }
}
