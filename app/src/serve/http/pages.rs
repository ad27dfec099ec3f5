//! The page for people and the documentation: files inside the binary that need nothing from outside.

use axum::http::header;
use axum::response::{IntoResponse, Response};

/// Nothing is loaded from elsewhere, and no other site may frame the page.
const POLICY: &str =
    "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

fn file(kind: &'static str, text: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::CACHE_CONTROL, "no-cache"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, text).into_response()
}

/// `GET /`.
pub(super) async fn page() -> Response {
    file("text/html; charset=utf-8", include_str!("../page/index.html"))
}

/// `GET /style.css`.
pub(super) async fn style() -> Response {
    file("text/css; charset=utf-8", include_str!("../page/style.css"))
}

/// `GET /app.js`.
pub(super) async fn script() -> Response {
    file("text/javascript; charset=utf-8", include_str!("../page/app.js"))
}

/// `GET /docs`.
pub(super) async fn docs() -> Response {
    file("text/html; charset=utf-8", include_str!("../page/docs.html"))
}

/// `GET /docs.js`.
pub(super) async fn docs_script() -> Response {
    file("text/javascript; charset=utf-8", include_str!("../page/docs.js"))
}
