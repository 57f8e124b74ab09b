//! The endpoints, in one table: the router, the labels of metrics, and a test of the OpenAPI document
//! take them from here. The files of the page are apart.

use crate::state::State;
use crate::{anthropic, live, llama, openai, openapi, plan, responses, utilities};
use axum::Router;
use axum::routing::{MethodFilter, MethodRouter, on};
use std::sync::Arc;

/// A path with a method and what answers it.
pub(crate) struct Route {
    /// Its method; `GET` takes `HEAD`, too.
    pub method: MethodFilter,
    /// Path with its parameters in braces.
    pub path: &'static str,
    handler: fn(MethodFilter) -> MethodRouter<Arc<State>>,
}

macro_rules! route {
    ($method:ident $path:expr => $handler:path) => {
        Route {
            method: MethodFilter::$method,
            path: $path,
            handler: |method| on(method, $handler),
        }
    };
}

/// Every endpoint.
pub(crate) static ROUTES: [Route; 36] = [
    route!(POST "/v1/chat/completions" => openai::chat),
    route!(POST "/v1/chat/completions/input_tokens" => openai::input_tokens),
    route!(POST "/v1/completions" => openai::completions),
    route!(POST "/v1/responses" => responses::responses),
    route!(POST "/v1/responses/input_tokens" => responses::input_tokens),
    route!(POST "/v1/embeddings" => openai::embeddings),
    route!(GET "/v1/models" => openai::models),
    route!(GET "/v1/models/{id}" => openai::one_model),
    route!(POST "/v1/messages" => anthropic::messages),
    route!(POST "/v1/messages/count_tokens" => anthropic::count_tokens),
    route!(GET "/health" => utilities::health),
    route!(GET "/metrics" => utilities::metrics),
    route!(GET "/props" => utilities::props),
    route!(GET "/slots" => utilities::slots),
    route!(POST "/tokenize" => utilities::tokenize),
    route!(POST "/detokenize" => utilities::detokenize),
    route!(POST "/apply-template" => utilities::apply_template),
    route!(GET live::PATH => live::live),
    route!(POST "/completion" => llama::completion),
    // Other paths of llama.cpp's server.
    route!(POST "/completions" => llama::completion),
    route!(POST "/chat/completions" => openai::chat),
    route!(POST "/chat/completions/input_tokens" => openai::input_tokens),
    route!(POST "/responses" => responses::responses),
    route!(POST "/responses/input_tokens" => responses::input_tokens),
    route!(GET "/models" => openai::models),
    route!(GET "/v1/health" => utilities::health),
    route!(POST "/infill" => llama::infill),
    route!(POST "/embedding" => openai::embeddings),
    route!(POST "/embeddings" => openai::embeddings),
    route!(POST "/rerank" => llama::rerank),
    route!(POST "/reranking" => llama::rerank),
    route!(POST "/v1/rerank" => llama::rerank),
    route!(POST "/v1/reranking" => llama::rerank),
    route!(GET plan::PATH => plan::show),
    route!(POST plan::PATH => plan::ask),
    route!(GET openapi::PATH => openapi::document),
];

/// Returns a router with all endpoints.
pub(super) fn router() -> Router<Arc<State>> {
    ROUTES.iter().fold(Router::new(), |router, route| {
        router.route(route.path, (route.handler)(route.method))
    })
}

/// Returns the path that a request is counted under. Others are strangers' words.
pub(super) fn label(path: &str) -> &'static str {
    let known = ROUTES.iter().map(|route| route.path).chain(["/"]);
    let mut known = known.filter(|known| !known.contains('{'));
    known.find(|known| *known == path).unwrap_or("other")
}
