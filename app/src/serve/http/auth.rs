//! API keys: from a file or the environment, compared in constant time, never shown.

use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::error::{ApiError, ApiResult};

/// A key with fewer characters is guessed too soon.
const SHORTEST: usize = 16;

/// Keys that open the server; none means that everybody may use it.
#[derive(Clone, Default)]
pub struct Keys(Vec<[u8; 32]>);

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keys({})", self.0.len())
    }
}

impl Keys {
    /// Reads keys, one a line or separated by commas; lines that begin with `#` are comments.
    ///
    /// # Errors
    /// A key is too short, or there is none.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let lines = text.lines().map(str::trim).filter(|l| !l.starts_with('#'));
        let keys: Vec<&str> =
            lines.flat_map(|l| l.split(',')).map(str::trim).filter(|k| !k.is_empty()).collect();
        anyhow::ensure!(!keys.is_empty(), "there is no API key in it");
        let short = keys.iter().position(|k| k.len() < SHORTEST);
        if let Some(i) = short {
            anyhow::bail!(
                "API key {} has {} characters; at least {SHORTEST} are needed",
                i + 1,
                keys[i].len()
            );
        }
        Ok(Self(keys.into_iter().map(digest).collect()))
    }

    /// Whether no key is needed.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Who asks: the number of the key, or nobody where none is needed.
    pub(crate) fn check(&self, headers: &HeaderMap) -> ApiResult<Option<usize>> {
        if self.is_empty() {
            return Ok(None);
        }
        let given = headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes).unwrap_or_default();
        let (scheme, key) = given.split_at(given.len().min(7));
        let bearer = scheme.eq_ignore_ascii_case(b"bearer ");
        let key: [u8; 32] = Sha256::digest(key).into();
        // All are compared, so that the time tells nothing.
        let mut found = None;
        for (i, known) in self.0.iter().enumerate() {
            if bool::from(known.ct_eq(&key)) {
                found = Some(i);
            }
        }
        if let (Some(i), true) = (found, bearer) {
            return Ok(Some(i));
        }
        let text = if given.is_empty() {
            "an API key is needed: send `Authorization: Bearer KEY`"
        } else {
            "the API key is not valid"
        };
        Err(ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", text))
    }
}

fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_keys_open() {
        let keys =
            Keys::parse("# team\nfirst-key-0123456789\n second-key-0123456789, third-key-0123456789\n")
                .unwrap();
        let check = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            keys.check(&headers).map_err(|e| e.status.as_u16())
        };
        assert_eq!(check("Bearer first-key-0123456789"), Ok(Some(0)));
        assert_eq!(check("bearer third-key-0123456789"), Ok(Some(2)));
        for bad in [
            "Bearer first-key-012345678",
            "Bearer ",
            "Basic first-key-0123456789",
            "first-key-0123456789",
            "",
        ] {
            assert_eq!(check(bad), Err(401), "{bad}");
        }
        assert_eq!(keys.check(&HeaderMap::new()).unwrap_err().status, 401);
        assert_eq!(Keys::default().check(&HeaderMap::new()).unwrap(), None);
        assert!(Keys::parse("short").is_err() && Keys::parse("# none\n").is_err());
        assert!(!format!("{keys:?}").contains("first"));
    }
}
