"""The host side of vocabulary alignment: byte tables, vocabulary maps, spans, targets."""
