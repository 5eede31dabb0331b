"""What tests are made of: the real servers, and fakes of our own ports."""
