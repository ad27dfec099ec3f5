//! The ops, one family a file, each op with all its rules in one `impl`.

pub mod activation;
pub mod attention;
pub mod conv;
pub mod elementwise;
pub mod index;
pub mod layout;
pub mod leaf;
pub mod linalg;
pub mod linear;
pub mod modulation;
pub mod nn;
pub mod patch;
pub mod pool;
pub mod reduce;
pub mod several;
pub mod window;
