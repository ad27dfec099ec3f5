//! The ops, one family a file, each op with all its rules in one `impl`.

pub mod conv;
pub mod elementwise;
pub mod fused;
pub mod index;
pub mod layout;
pub mod leaf;
pub mod linalg;
pub mod nn;
pub mod pool;
pub mod reduce;
pub mod window;
