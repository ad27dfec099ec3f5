//! Devices: where buffers live and programs run.

use std::fmt;
use std::str::FromStr;

use crate::error::RuntimeError;

/// Where a program runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Device {
    /// Host memory and the host's cores.
    #[default]
    Cpu,
    /// One NVIDIA GPU.
    Cuda {
        /// The CUDA driver's number of the GPU.
        ordinal: usize,
    },
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda { ordinal } => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for Device {
    type Err = RuntimeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let ordinal = |t: &str| t.parse().ok();
        match text.split_once(':') {
            None if text == "cpu" => Some(Self::Cpu),
            None if text == "cuda" => Some(Self::Cuda { ordinal: 0 }),
            Some(("cuda", n)) => ordinal(n).map(|ordinal| Self::Cuda { ordinal }),
            _ => None,
        }
        .ok_or_else(|| RuntimeError::InvalidValue {
            what: "device".to_owned(),
            expected: "cpu, cuda or cuda:<number>".to_owned(),
            got: format!("`{text}`"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_others_are_refused() {
        for device in [Device::Cpu, Device::Cuda { ordinal: 3 }] {
            assert_eq!(device.to_string().parse::<Device>().unwrap(), device);
        }
        for text in ["gpu", "cuda:x", "cpu:0", ""] {
            assert!(text.parse::<Device>().unwrap_err().to_string().contains("expected cpu"), "{text}");
        }
    }
}
