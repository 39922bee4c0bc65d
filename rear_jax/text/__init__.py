"""From words to numbers: cleaning of captions, vocabularies, and the encoder whose features a generator takes."""
