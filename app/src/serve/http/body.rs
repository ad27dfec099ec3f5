//! Bodies: of which type, in which encoding, how large and how slow.

use std::io::Read;
use std::sync::Arc;

use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header};
use flate2::read::{MultiGzDecoder, ZlibDecoder};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};

use super::App;
use super::error::{ApiError, ApiResult, is_protocol};
use super::fields::Fields;
use super::inference::HEADER_LENGTH;

/// What `Content-Encoding` may be.
const ENCODINGS: &str = "gzip, deflate, identity";

/// A body that was read whole, within the limits.
pub(crate) struct Body(pub(super) Vec<u8>);

impl Body {
    pub(super) fn fields(&self) -> ApiResult<Fields> {
        Fields::parse(&self.0)
    }
}

impl FromRequest<Arc<App>> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> ApiResult<Self> {
        check_type(request.headers(), request.uri().path())?;
        let encoding = Encoding::of(request.headers())?;
        let limit = app.limits.body;
        let read = Limited::new(request.into_body(), limit).collect();
        let bytes: Vec<u8> = match tokio::time::timeout(app.limits.read_time, read).await {
            Ok(Ok(body)) => body.to_bytes().into(),
            Ok(Err(error)) if error.is::<LengthLimitError>() => return Err(too_large(limit)),
            Ok(Err(_)) => return Err(broken("the body broke off")),
            Err(_) => {
                let text = format!("the body did not come within {} s", app.limits.read_time.as_secs_f64());
                return Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "body_timeout", text));
            }
        };
        if encoding == Encoding::Identity {
            return Ok(Self(bytes));
        }
        let decoded = tokio::task::spawn_blocking(move || encoding.decoded(&bytes, limit)).await;
        decoded.map_err(|_| super::images::internal("decoding a body panicked"))?.map(Self)
    }
}

/// A page of another origin cannot send JSON without asking first, so that is what has to come from a browser, which
/// always tells an origin. Others may leave the type out: Triton's client names none, curl says that it is a form.
fn check_type(headers: &HeaderMap, path: &str) -> ApiResult<()> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let browser = ["origin", "sec-fetch-site"].iter().any(|name| headers.contains_key(*name));
    let bare = !browser && matches!(kind.as_str(), "" | "application/x-www-form-urlencoded");
    let binary =
        is_protocol(path) && headers.contains_key(HEADER_LENGTH) && kind == "application/octet-stream";
    if kind == "application/json" || bare || binary {
        return Ok(());
    }
    let text = "send `Content-Type: application/json`";
    Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", text))
}

/// How a body is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    Identity,
    Gzip,
    Deflate,
}

impl Encoding {
    fn of(headers: &HeaderMap) -> ApiResult<Self> {
        let all = headers.get_all(header::CONTENT_ENCODING).iter();
        let all: Vec<String> = all
            .flat_map(|value| {
                String::from_utf8_lossy(value.as_bytes())
                    .to_lowercase()
                    .split(',')
                    .map(|e| e.trim().to_owned())
                    .collect::<Vec<_>>()
            })
            .filter(|encoding| !matches!(encoding.as_str(), "" | "identity"))
            .collect();
        match all.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            [] => Ok(Self::Identity),
            ["gzip" | "x-gzip"] => Ok(Self::Gzip),
            ["deflate"] => Ok(Self::Deflate),
            _ => {
                let got = super::fields::cut(&all.join(", "));
                let text = format!("`Content-Encoding` is {got}; expected one of {ENCODINGS}");
                let mut error =
                    ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_content_encoding", text);
                error.accept_encoding = Some(ENCODINGS);
                Err(error)
            }
        }
    }

    /// The bytes that were packed, `limit` at most.
    fn decoded(self, bytes: &[u8], limit: usize) -> ApiResult<Vec<u8>> {
        let most = limit as u64 + 1;
        let mut out = Vec::new();
        let read = match self {
            Self::Identity => bytes.take(most).read_to_end(&mut out),
            Self::Gzip => MultiGzDecoder::new(bytes).take(most).read_to_end(&mut out),
            Self::Deflate => ZlibDecoder::new(bytes).take(most).read_to_end(&mut out),
        };
        match read {
            Ok(_) if out.len() > limit => Err(too_large(limit)),
            Ok(_) => Ok(out),
            Err(error) => Err(broken(&format!("the body is not what its `Content-Encoding` says: {error}"))),
        }
    }
}

fn too_large(limit: usize) -> ApiError {
    let text = format!("the body has more than {limit} bytes");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", text)
}

fn broken(text: &str) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, "broken_body", text)
}
