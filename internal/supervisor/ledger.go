//go:build linux

package supervisor

import (
	"encoding/json"
	"fmt"
	"time"
)

// Cause is why a generation was started or ended.
type Cause string

// The causes.
const (
	ByStart   Cause = "start"
	ByRestart Cause = "restart"
	ByCrash   Cause = "crash"
	ByStop    Cause = "stop"
)

// Entry is the ledger's account of one change of generations.
type Entry struct {
	Number   int       `json:"number"`
	Request  uint64    `json:"request,omitempty"`
	Cause    Cause     `json:"cause"`
	From     int       `json:"from,omitempty"` // the old generation, 0 for none
	To       int       `json:"to,omitempty"`   // the new one
	Began    time.Time `json:"began"`
	Ready    time.Time `json:"ready,omitzero"`
	Steered  time.Time `json:"steered,omitzero"`
	Ended    time.Time `json:"ended,omitzero"`
	Queued   int       `json:"queued"`   // connections that waited on the old generation's queues when it was steered
	Migrated int       `json:"migrated"` // of those, handed to the new one by the kernel
	Drained  Drained   `json:"drained"`
	Error    string    `json:"error,omitempty"`  // why the candidate failed
	Output   []string  `json:"output,omitempty"` // its last lines
}

// Drained is what became of the old generation's connections.
type Drained struct {
	Finished int           `json:"finished"` // ended by the program or the client
	Polite   int           `json:"polite"`   // kept-alive, ended by berth while nothing was in flight
	Idle     int           `json:"idle"`     // left open and idle when the generation was stopped
	Cut      int           `json:"cut"`      // something was in flight when the generation was stopped
	Took     time.Duration `json:"took"`
	Wait     time.Duration `json:"wait"` // no connection waited in a queue for longer
}

func (d *Drained) add(o Drained) {
	d.Finished += o.Finished
	d.Polite += o.Polite
	d.Idle += o.Idle
	d.Cut += o.Cut
	d.Took += o.Took
	d.Wait = max(d.Wait, o.Wait)
}

// String is the entry in one line.
func (e Entry) String() string {
	name := fmt.Sprintf("%s %d", e.Cause, e.Number)
	if e.Error != "" {
		return name + ": failed: " + e.Error
	}
	total := round(e.Ended.Sub(e.Began))
	drained := fmt.Sprintf("%d cut, %d drained (%d politely)", e.Drained.Cut, e.Drained.Finished+e.Drained.Polite, e.Drained.Polite)
	switch {
	case e.Cause == ByStop:
		return fmt.Sprintf("%s: in %s: %s", name, total, drained)
	case e.From == 0:
		return fmt.Sprintf("%s: generation %d serves after %s", name, e.To, total)
	}
	return fmt.Sprintf("%s: generation %d → %d in %s: %s, %d migrated, longest wait %s",
		name, e.From, e.To, total, drained, e.Migrated, round(e.Drained.Wait))
}

func round(d time.Duration) time.Duration {
	if d > time.Second {
		return d.Round(10 * time.Millisecond)
	}
	return d.Round(time.Millisecond)
}

// MarshalJSON gives durations in milliseconds.
func (d Drained) MarshalJSON() ([]byte, error) {
	return json.Marshal(drainedJSON{d.Finished, d.Polite, d.Idle, d.Cut, ms(d.Took), ms(d.Wait)})
}

// UnmarshalJSON is the inverse of MarshalJSON.
func (d *Drained) UnmarshalJSON(data []byte) error {
	var j drainedJSON
	if err := json.Unmarshal(data, &j); err != nil {
		return err
	}
	*d = Drained{j.Finished, j.Polite, j.Idle, j.Cut, duration(j.Took), duration(j.Wait)}
	return nil
}

type drainedJSON struct {
	Finished int     `json:"finished"`
	Polite   int     `json:"polite"`
	Idle     int     `json:"idle"`
	Cut      int     `json:"cut"`
	Took     float64 `json:"took_ms"`
	Wait     float64 `json:"longest_wait_ms"`
}

func ms(d time.Duration) float64        { return float64(d.Microseconds()) / 1000 }
func duration(ms float64) time.Duration { return time.Duration(ms * float64(time.Millisecond)) }
