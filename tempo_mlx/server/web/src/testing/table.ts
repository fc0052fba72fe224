/** The settings table as the server sends it, and what follows from choices: written by `make docs`. */

import type { Values } from '../lib/run'
import type { Chosen, Setting, SettingsTable } from '../lib/settings'
import written from './settings.json'

export const table = { ...written.table, settings: written.settings as unknown as Setting[] } as SettingsTable

/** Choices, and the values that differ from the defaults under them. */
export const forms = written.forms as unknown as { chosen: Chosen; changed: Values }[]

/** The same for the settings of run files of version 0.1.0. */
export const old = written.old as unknown as { config: Values; changed: Values }[]
