//! Telling people about the results.

mod report;

register_stages!(report::Report);
