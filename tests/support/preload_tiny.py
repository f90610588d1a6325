"""What a fork server of trials that don't train imports."""

from tests.support.tiny_training import stand_in

stand_in()
