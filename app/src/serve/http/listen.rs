//! Connections: where they come in, how slow they may be, and how they end.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use futures_util::future::select_all;
use http_body_util::BodyExt as _;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tower::ServiceExt as _;

use super::Limits;
use super::layers::{LARGEST_HEAD, MOST_HEADERS};
use super::places::{Occupant, Phase, Places};
use super::timed_stream::TimedStream;

/// After a failed accept.
const PAUSE: Duration = Duration::from_millis(50);
/// Between two looks at a request whose first line is not whole.
const GLANCE: Duration = Duration::from_millis(5);
/// An idle connection is closed so much later than clients are told, so that they close it first.
const LENIENCE: Duration = Duration::from_secs(1);

/// What every connection needs.
#[derive(Clone)]
struct Shared {
    places: Arc<Places>,
    router: Router,
    limits: Arc<Limits>,
    builder: http1::Builder,
}

/// Serves connections until `ended` says true; then waits for answers on their way, for `grace` at most.
pub(in crate::serve) async fn listen(
    listeners: Vec<TcpListener>,
    router: Router,
    limits: Limits,
    mut ended: watch::Receiver<bool>,
    grace: Duration,
) {
    let graceful = GracefulShutdown::new();
    let mut builder = http1::Builder::new();
    // Larger heads than are taken are read, so that the refusal says what is wrong in the shape of the path.
    builder.timer(TokioTimer::new()).max_buf_size(4 * LARGEST_HEAD).max_headers(4 * MOST_HEADERS);
    let keep = !limits.keep_alive.is_zero();
    let idle = if keep { limits.keep_alive } else { limits.read_time };
    builder.keep_alive(keep).header_read_timeout(idle + LENIENCE);
    let shared =
        Shared { places: Places::new(limits.connections), router, limits: Arc::new(limits), builder };
    let mut told = false;
    loop {
        let accept = select_all(listeners.iter().map(|listener| Box::pin(listener.accept())));
        let (accepted, ..) = tokio::select! {
            accepted = accept => accepted,
            _ = ended.wait_for(|e| *e) => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    crate::console::note(&format!(
                        "serve: a connection cannot be accepted: {error}; idle ones are closed to make room (told once)"
                    ));
                }
                shared.places.make_room();
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        // Small answers must not wait for each other.
        let _ = stream.set_nodelay(true);
        let (shared, watcher) = (shared.clone(), graceful.watcher());
        if let Some(place) = shared.places.place() {
            let occupant = Occupant::new(&shared.places);
            tokio::spawn(shared.serve(stream, occupant, place, watcher));
            continue;
        }
        let waiting = tokio::select! {
            waiting = shared.places.waiting_place() => waiting,
            _ = ended.wait_for(|e| *e) => break,
        };
        if let Some(waiting) = waiting {
            tokio::spawn(shared.wait(stream, waiting, watcher));
        }
    }
    drop(listeners);
    let _ = tokio::time::timeout(grace, graceful.shutdown()).await;
}

impl Shared {
    /// Serves a connection in its place to the end.
    async fn serve(
        self,
        stream: TcpStream,
        occupant: Arc<Occupant>,
        place: OwnedSemaphorePermit,
        watcher: Watcher,
    ) {
        let io = TokioIo::new(TimedStream::new(stream, occupant.clone(), &self.limits));
        let (router, of) = (self.router, occupant.clone());
        let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
            of.enter(Phase::Asked);
            let answered = Answered(of.clone());
            let answer = router.clone().oneshot(request.map(axum::body::Body::new));
            async move {
                let answer = answer.await?;
                Ok::<_, std::convert::Infallible>(answer.map(|body| {
                    body.map_frame(move |frame| {
                        let _ = &answered;
                        frame
                    })
                }))
            }
        });
        let connection = watcher.watch(self.builder.serve_connection(io, service));
        tokio::select! {
            // A client that breaks the protocol or goes away is no news.
            _ = connection => {}
            () = occupant.asked_to_leave() => {}
        }
        drop(place);
    }

    /// Keeps a connection until there is a place for it; a probe is answered where it stands.
    async fn wait(self, stream: TcpStream, waiting: OwnedSemaphorePermit, watcher: Watcher) {
        let occupant = Occupant::new(&self.places);
        let mut waiting = Some(waiting);
        let place = {
            let next = self.places.next_place();
            tokio::pin!(next);
            tokio::select! {
                place = &mut next => place,
                probe = is_probe(&stream, self.limits.read_time) => match probe {
                    Some(true) => waiting.take(),
                    // Somebody who asks is not sent away.
                    Some(false) => {
                        occupant.enter(Phase::Asked);
                        next.await
                    }
                    None => None,
                },
                () = occupant.asked_to_leave() => None,
            }
        };
        drop(waiting);
        let Some(place) = place else { return };
        occupant.enter(Phase::Idle);
        self.serve(stream, occupant, place, watcher).await;
    }
}

/// Tells a connection that its answer is made, when the last of it is taken.
struct Answered(Arc<Occupant>);

impl Drop for Answered {
    fn drop(&mut self) {
        self.0.enter(Phase::Answered);
    }
}

/// Whether a connection asks for the server's health; none when it is gone or says nothing in time.
async fn is_probe(stream: &TcpStream, time: Duration) -> Option<bool> {
    const PROBES: [&[u8]; 4] = [b"GET /v2/health/", b"GET /health", b"HEAD /v2/health/", b"HEAD /health"];
    let look = async {
        loop {
            let mut start = [0; 16];
            match stream.peek(&mut start).await {
                Ok(n) if n > 0 => {
                    let start = &start[..n];
                    if PROBES.iter().any(|probe| start.starts_with(probe)) {
                        return Some(true);
                    }
                    if !PROBES.iter().any(|probe| probe.starts_with(start)) {
                        return Some(false);
                    }
                }
                _ => return None,
            }
            tokio::time::sleep(GLANCE).await;
        }
    };
    tokio::time::timeout(time, look).await.ok().flatten()
}
