//! What people look at: grids of pictures, line plots, sample arrays and progress lines.
//!
//! Nothing here knows a model, a program or a run directory: every function takes plain numbers and names.
//! Files are written beside their final place and renamed, so that a reader never sees half of one.
//!
//! | module | gives |
//! |---|---|
//! | [`pixels`] | float images as bytes, rounded as the published FID sets are |
//! | [`grid`] | a labelled PNG, one class a column |
//! | [`plot`] | an SVG line plot, raw and smoothed |
//! | [`icicle`] | an SVG of nested shares |
//! | [`arrays`] | `.npz` of samples and labels, streamed |
//! | [`progress`] | a bar on a terminal, a line every few seconds elsewhere |

pub mod arrays;
mod axis;
pub mod grid;
pub mod icicle;
mod lettering;
pub mod pixels;
pub mod plot;
pub mod progress;
