//! Going on with a part: are its images still the ones that its features are of?
//!
//! Names say nothing of that: a folder is filled again, an array is written anew. So each block has a stamp of its files, which
//! is compared first, and a hash of its pixels, which decides where the stamps differ, as those of copies do.

use std::ops::Range;

use anyhow::{Context, bail};
use runtime::file::hexadecimal;
use sha2::{Digest, Sha256};

use super::part::Part;
use super::source::fingerprint::Fingerprint;
use super::source::{Picture, Source, Values};

/// Makes a part that was found the one that is asked for: as it is if its images are still the same, from its beginning
/// if they have changed; `note` is told.
///
/// # Errors
/// Features of images of other names, which are not thrown away; images that cannot be read.
pub fn settle(part: &mut Part, source: &mut dyn Source, note: &dyn Fn(&str)) -> anyhow::Result<()> {
    let asked = part.asked().map_or_else(|| part.range(), super::part::Asked::range);
    // A part that is all there is cannot be put together with others.
    let identity = if asked == (0..source.count()) {
        None
    } else {
        let mut whole = Fingerprint::with_contents();
        source.fingerprint(0..source.count(), &mut whole)?;
        Some(whole.identity())
    };
    let place = part.directory().display().to_string();
    let changed = match part.asked() {
        Some(asked) if !asked.fits => Some("their number".to_owned()),
        _ => first_change(part, source, note)?.map(|r| format!("first in images {}..{}", r.start, r.end)),
    };
    let Some(what) = changed else { return part.settle(identity) };
    if let Some(other) = part.asked().and_then(|a| a.other.as_ref()) {
        bail!(
            "`{place}` holds features of something else ({other}, here against there); remove it, or name another \
             directory by --work"
        );
    }
    note(&format!("the images have changed since `{place}` was begun ({what}): starting anew"));
    part.restart(identity)
}

/// The first block of a part whose images are others now.
fn first_change(
    part: &mut Part,
    source: &mut dyn Source,
    note: &dyn Fn(&str),
) -> anyhow::Result<Option<Range<u64>>> {
    let (start, block) = (part.range().start, part.plan().block);
    let done = start..start + part.seen.images;
    let trusted = part.asked().is_none_or(|a| a.same_choice);
    let stamps = stamps(source, done.clone(), block)?;
    let same =
        |(k, stamp): (usize, &String)| trusted && !stamp.is_empty() && part.seen.stamps.get(k) == Some(stamp);
    let Some(first) = stamps.iter().enumerate().position(|pair| !same(pair)) else { return Ok(None) };
    let from = start + first as u64 * block;
    note(&format!("comparing the images {from}..{} with those that were seen before", done.end));
    let mut pictures = source.pictures(from..done.end);
    for (k, begin) in (from..done.end).step_by(block as usize).enumerate() {
        let range = begin..(begin + block).min(done.end);
        let mut pixels = Sha256::new();
        for index in range.clone() {
            let picture =
                pictures.next().with_context(|| format!("internal: image {index} is missing"))??;
            add_pixels(&mut pixels, &picture);
        }
        if part.seen.blocks.get(first + k) != Some(&hexadecimal(&pixels.finalize())) {
            return Ok(Some(range));
        }
    }
    part.seen.stamps = stamps;
    Ok(None)
}

/// Stamps of the blocks of `range`; empty where only pixels tell. Taken before the images are read, so that one that changes
/// meanwhile is seen.
pub(super) fn stamps(source: &mut dyn Source, range: Range<u64>, block: u64) -> anyhow::Result<Vec<String>> {
    let blocks = range.clone().step_by(block as usize);
    blocks
        .map(|first| {
            let mut fingerprint = Fingerprint::default();
            source.fingerprint(first..(first + block).min(range.end), &mut fingerprint)?;
            Ok(fingerprint.stamp().unwrap_or_default())
        })
        .collect()
}

/// Adds size and pixels of an image to the hash of its block.
pub(super) fn add_pixels(hash: &mut Sha256, picture: &Picture) {
    for number in [picture.height, picture.width, picture.channels] {
        hash.update((number as u64).to_le_bytes());
    }
    match &picture.values {
        Values::U8(values) => hash.update(values),
        Values::F32(values) => values.iter().for_each(|v| hash.update(v.to_le_bytes())),
    }
}
