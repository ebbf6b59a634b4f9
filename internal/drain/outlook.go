package drain

import "time"

const (
	// DefaultQuiet is how long nothing may have moved after a response before its connection counts as idle. It only has to cover a response
	// that is written in pieces and whose pieces weren't seen to take longer.
	DefaultQuiet = 2 * time.Millisecond

	// Silence is how long a connection on which nothing was ever received is left alone after it was first seen: its client may be about to
	// send. It is also the quiet that counts as idle where the order of the last request and response can't be told.
	Silence = time.Second

	// pollEvery is how often busy connections are looked at.
	pollEvery = time.Millisecond

	// freshFor and stale keep away from the client's next request. A client that pauses for a steady time sends it long after the
	// beginning of its pause, and the end of a pause can't be told. So a connection is ended at the beginning (within freshFor of the first moment
	// when it counts as idle), or when it has been idle for so long that a request in just the fraction of a millisecond
	// until the client hears of the end is improbable.
	freshFor = 2 * time.Millisecond
	stale    = 200 * time.Millisecond

	// rhythmCap bounds what one connection's gaps can mean for others.
	rhythmCap = 250 * time.Millisecond
	// ownRhythm is how many responses a connection must have had for its own gaps to speak for it.
	ownRhythm = 8
)

// A phase is where a connection stands between requests.
type phase uint8

const (
	silent   phase = iota // nothing was ever received
	inFlight              // a request was received, and the response hasn't left, or not all of it
	answered              // something was sent after the last request
	unsure                // either of the two above
)

// An outlook is what is known of a connection when it is judged.
type outlook struct {
	phase    phase
	since    time.Duration // when it got there: the last payload; for silent, when it was first seen
	earliest time.Duration // since, if that isn't known exactly, is no earlier than this
	patience time.Duration // how much quiet means that the response is complete
}

// idle reports whether the connection can be ended now, and if not, when to look again; 0 is as soon as possible.
func (o outlook) idle(now time.Duration) (ok bool, again time.Duration) {
	quiet := now - o.since
	switch o.phase {
	case silent, unsure:
		if quiet >= Silence {
			return true, 0
		}
	case answered:
		switch {
		case quiet < o.patience:
			return false, min(o.since+o.patience, now+pollEvery)
		case now-o.earliest < o.patience+freshFor, quiet >= stale:
			return true, 0
		}
	}
	return false, 0
}

// quiet reports whether nothing is in flight, whether or not this is the moment to end the connection.
func (o outlook) quiet(now time.Duration) bool {
	switch o.phase {
	case answered:
		return now-o.since >= o.patience
	case silent, unsure:
		return now-o.since >= Silence
	}
	return false
}

// outlook judges by the exact order. Rhythm is the longest gap in any of the generation's responses.
func (a Activity) outlook(quiet, rhythm time.Duration) outlook {
	if a.LastOut <= a.LastIn {
		return outlook{phase: inFlight, since: a.LastIn, earliest: a.LastIn}
	}
	if a.Complete {
		return outlook{phase: answered, since: a.LastOut, earliest: a.LastOut, patience: quiet}
	}
	patience := max(quiet, 2*a.Gap)
	if a.Responses < ownRhythm {
		patience = max(patience, 2*min(rhythm, rhythmCap))
	}
	if a.Open {
		patience = max(patience, Silence)
	}
	return outlook{phase: answered, since: a.LastOut, earliest: a.LastOut, patience: patience}
}
