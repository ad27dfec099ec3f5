//! Ops on images (N, C, H, W) below a moving window, as methods.

use crate::ops::conv::{Conv, ConvTranspose};
use crate::ops::pool::{AveragePool, MaxPool};
use crate::ops::window::Window;
use crate::value::Value;

impl Value<'_> {
    /// Convolution of images (N, C, H, W) with filters (O, C, I, J), plus `bias` (O).
    #[track_caller]
    pub fn conv(self, weight: Self, bias: Option<Self>, window: Window) -> Self {
        let args: Vec<Self> = [self, weight].into_iter().chain(bias).collect();
        self.builder.push(Conv { window }.into(), &args)
    }

    /// Transpose of [`Value::conv`]: images of `size` from the (N, O, H', W') that a convolution of them would give.
    #[track_caller]
    pub fn conv_transpose(self, weight: Self, size: [usize; 2], window: Window) -> Self {
        self.builder.push(ConvTranspose { window, size }.into(), &[self, weight])
    }

    /// The largest value below a window of `kernel` rows and columns.
    #[track_caller]
    pub fn max_pool(self, kernel: [usize; 2], window: Window) -> Self {
        self.builder.push(MaxPool { kernel, window }.into(), &[self])
    }

    /// The mean below a window of `kernel` rows and columns, over the padding's zeros too if `count_padding`.
    #[track_caller]
    pub fn average_pool(self, kernel: [usize; 2], window: Window, count_padding: bool) -> Self {
        self.builder.push(AveragePool { kernel, window, count_padding }.into(), &[self])
    }
}
