"""One module per command of `issp`: HELP, EXAMPLE, add_arguments(parser), main(args) -> status."""
