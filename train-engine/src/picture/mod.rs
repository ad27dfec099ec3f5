//! Picture files: which there are, and what they decode to. Training, `data check` and `fid` read pictures here and nowhere
//! else, so that they see the same files and the same pixels.
//!
//! | module | does |
//! |---|---|
//! | [`decode`](mod@decode) | PNG and JPEG by their contents, whole files only |
//! | `jpeg` | libjpeg-turbo's decoder |
//! | [`listing`] | which files of a directory or archive are pictures, and what is left out |

pub mod decode;
mod jpeg;
pub mod listing;

pub use decode::{Decoded, MAX_ENCODED, decode, read};
pub use listing::{Kind, LeftOut, Listing, is_private, kind, list};

#[cfg(test)]
mod tests;
