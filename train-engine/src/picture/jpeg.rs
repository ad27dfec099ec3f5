//! JPEG files by the decoder that Pillow uses, libjpeg-turbo's: slow integer DCT, smooth upsampling of colour.
//!
//! Data sets, published statistics and the tools that FID is compared with all see pixels of this decoder; others differ from
//! it by up to 4 of 255 in every fifth value. Unlike Pillow it refuses what libjpeg only warns of where part of the picture is
//! lost and would be filled up with grey.
#![allow(unsafe_code, reason = "calls libjpeg, and unwinds out of it on errors as its bindings provide for")]

use std::ffi::{c_int, c_ulong};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::{mem, ptr};

use image::metadata::Orientation;
use image::{DynamicImage, GrayImage, RgbImage};
use mozjpeg_sys::{
    J_COLOR_SPACE, JWRN_ADOBE_XFORM, JWRN_EXTRANEOUS_DATA, JWRN_JFIF_MAJOR, JWRN_JPEG_EOF,
    JWRN_NOT_SEQUENTIAL, JWRN_TOO_MUCH_DATA, jpeg_common_struct, jpeg_create_decompress,
    jpeg_decompress_struct, jpeg_destroy_decompress, jpeg_error_mgr, jpeg_finish_decompress, jpeg_mem_src,
    jpeg_read_header, jpeg_read_scanlines, jpeg_save_markers, jpeg_start_decompress, jpeg_std_error,
};

use super::decode::{Decoded, check_size};

/// Marker of the segment that holds EXIF data, and how that begins.
const APP1: c_int = 0xE1;
const EXIF: &[u8] = b"Exif\0\0";
/// Longest message of libjpeg (`JMSG_LENGTH_MAX`).
const MESSAGE: usize = 200;

/// Decodes a whole file; grey stays grey, CMYK becomes RGB as Pillow's `convert` does it.
///
/// # Errors
/// libjpeg's own words: no JPEG, an unknown kind, data that are damaged or cut short.
pub(super) fn decode(bytes: &[u8]) -> Result<Decoded, String> {
    let decoded = catch_unwind(AssertUnwindSafe(|| Decoder::open(bytes).picture()));
    decoded.unwrap_or_else(|cause| {
        Err(cause.downcast().map_or_else(|_| "the JPEG decoder failed".to_owned(), |text| *text))
    })
}

/// libjpeg at work. Its functions leave by unwinding with a `String`, which [`decode`] catches.
struct Decoder<'a> {
    /// Boxed, for it points to `errors` and libjpeg's parts point to each other.
    state: Box<jpeg_decompress_struct>,
    _errors: Box<jpeg_error_mgr>,
    _bytes: PhantomData<&'a [u8]>,
}

impl<'a> Decoder<'a> {
    /// Reads the header.
    fn open(bytes: &'a [u8]) -> Self {
        // SAFETY: both are numbers, pointers and optional functions, for which zeros are valid, and are filled in by libjpeg;
        // `errors` and `bytes` outlive `state`, which keeps pointers to them.
        unsafe {
            let mut errors: Box<jpeg_error_mgr> = Box::new(mem::zeroed());
            jpeg_std_error(&mut errors);
            errors.error_exit = Some(stop);
            errors.emit_message = Some(warned);
            let mut state: Box<jpeg_decompress_struct> = Box::new(mem::zeroed());
            state.common.err = &raw mut *errors;
            let mut decoder = Self { state, _errors: errors, _bytes: PhantomData };
            jpeg_create_decompress(&raw mut *decoder.state);
            jpeg_mem_src(&mut decoder.state, bytes.as_ptr(), bytes.len() as c_ulong);
            jpeg_save_markers(&mut decoder.state, APP1, 0xFFFF);
            jpeg_read_header(&mut decoder.state, 1);
            decoder
        }
    }

    fn picture(mut self) -> Result<Decoded, String> {
        let (width, height) = (self.state.image_width, self.state.image_height);
        check_size(width, height)?;
        let orientation = self.orientation();
        let (out, channels) = match self.state.jpeg_color_space {
            J_COLOR_SPACE::JCS_GRAYSCALE => (J_COLOR_SPACE::JCS_GRAYSCALE, 1),
            J_COLOR_SPACE::JCS_CMYK | J_COLOR_SPACE::JCS_YCCK => (J_COLOR_SPACE::JCS_CMYK, 4),
            _ => (J_COLOR_SPACE::JCS_RGB, 3),
        };
        self.state.out_color_space = out;
        let mut pixels = vec![0; width as usize * height as usize * channels];
        self.read(&mut pixels, width as usize * channels);
        let image = match channels {
            1 => GrayImage::from_raw(width, height, pixels).map(DynamicImage::from),
            3 => RgbImage::from_raw(width, height, pixels).map(DynamicImage::from),
            _ => RgbImage::from_raw(width, height, rgb_of_cmyk(&pixels)).map(DynamicImage::from),
        };
        let image = image.ok_or("internal: a picture of another size than it says")?;
        Ok(Decoded { image, orientation })
    }

    /// Reads every row and what follows up to the end marker.
    fn read(&mut self, pixels: &mut [u8], row_len: usize) {
        // SAFETY: the header has been read; `row` has room for a row of the components that were asked for.
        unsafe {
            jpeg_start_decompress(&mut self.state);
            for row in pixels.chunks_exact_mut(row_len) {
                let mut row = row.as_mut_ptr();
                jpeg_read_scanlines(&mut self.state, &raw mut row, 1);
            }
            jpeg_finish_decompress(&mut self.state);
        }
    }

    fn orientation(&self) -> Orientation {
        let mut next = self.state.marker_list;
        // SAFETY: a list that the header left behind, valid as long as `state`; each entry has `data_length` bytes.
        while let Some(marker) = unsafe { next.as_ref() } {
            let data = unsafe { std::slice::from_raw_parts(marker.data, marker.data_length as usize) };
            if let Some(found) = data.strip_prefix(EXIF).and_then(Orientation::from_exif_chunk) {
                return found;
            }
            next = marker.next;
        }
        Orientation::NoTransforms
    }
}

impl Drop for Decoder<'_> {
    fn drop(&mut self) {
        // SAFETY: frees what libjpeg has allocated; `state` is not used again.
        unsafe { jpeg_destroy_decompress(&mut self.state) }
    }
}

/// What libjpeg calls where it cannot go on.
#[cold]
unsafe extern "C-unwind" fn stop(state: &mut jpeg_common_struct) {
    let mut text = [0_u8; MESSAGE];
    // SAFETY: the error manager is the one of `Decoder::open`; its formatter writes at most `MESSAGE` bytes with an end, which
    // the bindings' type does not say.
    unsafe {
        if let Some(format) = state.err.as_ref().and_then(|errors| errors.format_message) {
            type Format = unsafe extern "C-unwind" fn(*mut jpeg_common_struct, *mut u8);
            let format: Format = mem::transmute::<*const (), Format>(format as *const ());
            format(ptr::from_mut(state), text.as_mut_ptr());
        }
    }
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    // No panic: the hook that prints is not for bad files.
    resume_unwind(Box::new(String::from_utf8_lossy(text).into_owned()));
}

/// What libjpeg calls for warnings (level -1) and notes. All but some warnings tell of lost pixels and are errors here.
unsafe extern "C-unwind" fn warned(state: &mut jpeg_common_struct, level: c_int) {
    const HARMLESS: [c_int; 5] =
        [JWRN_ADOBE_XFORM, JWRN_EXTRANEOUS_DATA, JWRN_JFIF_MAJOR, JWRN_NOT_SEQUENTIAL, JWRN_TOO_MUCH_DATA];
    // SAFETY: the error manager is the one of `Decoder::open`.
    let code = unsafe { state.err.as_ref() }.map_or(0, |errors| errors.msg_code);
    if level >= 0 || HARMLESS.contains(&code) {
        return;
    }
    if code == JWRN_JPEG_EOF {
        resume_unwind(Box::new("the JPEG file is cut short".to_owned()));
    }
    // SAFETY: the same state.
    unsafe { stop(state) };
}

/// Pillow's `convert("RGB")` of CMYK, whose files hold inverted values.
fn rgb_of_cmyk(pixels: &[u8]) -> Vec<u8> {
    let product = |a: u8, b: u8| {
        let product = u32::from(a) * u32::from(b) + 128;
        ((product >> 8) + product) >> 8
    };
    let colour =
        |[c, m, y, k]: &[u8; 4]| [*c, *m, *y].map(|ink| k.saturating_sub(product(255 - ink, *k) as u8));
    pixels.as_chunks().0.iter().flat_map(colour).collect()
}
