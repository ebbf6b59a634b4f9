package load

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
)

// A Kind is a way for a request to fail. Each failed request has exactly one.
type Kind uint8

const (
	// Refused: nobody listened (ECONNREFUSED).
	Refused Kind = iota

	// Reset: the connection was reset before any byte of its first response.
	Reset

	// CutShort: the connection was closed or reset within a response, or closed before the first one.
	CutShort

	// TimedOut: no connection, or no whole response, within the timeout.
	TimedOut

	// WrongAnswer: a status that isn't 2xx, a body without the expected text, or something that isn't an HTTP response.
	WrongAnswer

	// Race: a request on a connection that had answered before met the server's close or reset instead of its
	// response's first byte. A client that resends such requests recovers from it if the request may be sent twice.
	Race

	// Other: anything else, by the name of its errno: EADDRNOTAVAIL, EHOSTUNREACH, EMFILE.
	Other

	kinds
)

var kindNames = [kinds]struct{ key, words string }{
	Refused:     {"refused", "refused"},
	Reset:       {"reset", "reset"},
	CutShort:    {"cut_short", "cut short"},
	TimedOut:    {"timed_out", "timed out"},
	WrongAnswer: {"wrong_answer", "wrong answer"},
	Race:        {"race", "met a close"},
	Other:       {"other", "other"},
}

// String returns the kind in words, such as "cut short".
func (k Kind) String() string {
	if k < kinds {
		return kindNames[k].words
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// MarshalText returns the kind's key in JSON, such as cut_short.
func (k Kind) MarshalText() ([]byte, error) {
	if k < kinds {
		return []byte(kindNames[k].key), nil
	}
	return nil, fmt.Errorf("no such kind of failure: %d", uint8(k))
}

// UnmarshalText reads what MarshalText wrote.
func (k *Kind) UnmarshalText(text []byte) error {
	for i, n := range kindNames {
		if n.key == string(text) {
			*k = Kind(i)
			return nil
		}
	}
	return fmt.Errorf("no such kind of failure: %q", text)
}

// gone reports whether the peer ended the connection, by FIN or by RST.
func gone(err error) bool { return errors.Is(err, io.EOF) || reset(err) }

func reset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

func timedOut(err error) bool {
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, syscall.ETIMEDOUT)
}

// kindOfConnect names a failure to connect.
func kindOfConnect(err error) Kind {
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return Refused
	case reset(err):
		return Reset
	case timedOut(err):
		return TimedOut
	}
	return Other
}

// kindOfCut names the end of a connection on which a response was awaited. begun says that some bytes of it had come,
// reused that the connection had answered before.
func kindOfCut(err error, begun, reused bool) Kind {
	switch {
	case timedOut(err):
		return TimedOut
	case !gone(err):
		return Other
	case begun:
		return CutShort
	case reused:
		return Race
	case reset(err):
		return Reset
	}
	return CutShort
}
