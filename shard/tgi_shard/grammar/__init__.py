"""Which tokens a row's grammar allows next. The matchers are llguidance's; see tgi_proto/grammar.py."""
