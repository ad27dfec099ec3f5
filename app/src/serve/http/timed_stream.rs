//! The bytes of a connection, with an eye on heads of requests that come too slowly.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};
use tokio_io_timeout::TimeoutStream;

use super::Limits;
use super::places::{Occupant, Phase};

/// A client's connection.
pub(super) struct TimedStream {
    stream: Pin<Box<TimeoutStream<TcpStream>>>,
    occupant: Arc<Occupant>,
    head_time: Duration,
    /// When the head that has begun must be there.
    late: Pin<Box<Sleep>>,
}

impl TimedStream {
    pub(super) fn new(stream: TcpStream, occupant: Arc<Occupant>, limits: &Limits) -> Self {
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(limits.write_time));
        let head_time = limits.read_time;
        Self { stream: Box::pin(stream), occupant, head_time, late: Box::pin(sleep(head_time)) }
    }
}

impl AsyncRead for TimedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.occupant.phase() == Phase::Head && self.late.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let before = out.filled().len();
        let read = self.stream.as_mut().poll_read(cx, out);
        if out.filled().len() > before && self.occupant.phase() == Phase::Idle {
            self.occupant.enter(Phase::Head);
            let end = Instant::now() + self.head_time;
            self.late.as_mut().reset(end);
        }
        read
    }
}

impl AsyncWrite for TimedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.stream.as_mut().poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = self.stream.as_mut().poll_flush(cx);
        // Whoever writes flushes when nothing is left.
        if matches!(flushed, Poll::Ready(Ok(()))) && self.occupant.phase() == Phase::Answered {
            self.occupant.enter(Phase::Idle);
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream.as_mut().poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stream.as_mut().poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
