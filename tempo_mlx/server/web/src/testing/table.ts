/** A small settings table for tests, shaped like the server's. */

import type { Setting, SettingsTable } from '../lib/settings'

function setting(name: string, type: Setting['type'], value: Setting['default'], more: Partial<Setting> = {}): Setting {
  return {
    name,
    group: 'Selection',
    help: '',
    type,
    many: false,
    optional: false,
    default: value,
    default_text: String(value),
    minimum: null,
    maximum: null,
    above: null,
    below: null,
    choices: [],
    values_text: 'a number from 0 to 1',
    decoders: null,
    needs: null,
    ...more,
  }
}

export const table: SettingsTable = {
  model: 'smollm2-135m',
  context_length: 8192,
  chat: true,
  presets: {
    lineage: {},
    original: { attend: 'all', combine: 'last', use_retroactive_pruning: true, pruning_signal: 'attention' },
    plain: { decoder: 'plain' },
  },
  decoders: ['superposed', 'tree', 'plain'],
  session_decoders: ['superposed', 'plain'],
  groups: ['Input', 'Lengths', 'Selection', 'Retroactive pruning', 'Search', 'Early exit'],
  settings: [
    setting('chat', 'boolean', false, { group: 'Input' }),
    setting('system', 'string', null, { group: 'Input', optional: true, needs: { chat: [] } }),
    setting('max_tokens', 'integer', 100, { group: 'Lengths', minimum: 1, maximum: 1e6 }),
    setting('stop', 'string', [], { group: 'Lengths', many: true }),
    setting('seed', 'integer', 42, { group: 'Lengths', minimum: 0 }),
    setting('temperature', 'number', 1, { group: 'Lengths', minimum: 0, maximum: 100 }),
    setting('threshold', 'number', 0.1, { minimum: 0, maximum: 1, decoders: ['superposed', 'tree'] }),
    setting('max_parallel_tokens', 'integer', 8, { minimum: 1, maximum: 256, choices: ['auto'] }),
    setting('attend', 'string', 'lineage', { choices: ['lineage', 'all', 'weighted', 'best'] }),
    setting('combine', 'string', 'mix', { choices: ['mix', 'last'] }),
    setting('use_retroactive_pruning', 'boolean', false, { group: 'Retroactive pruning' }),
    setting('pruning_signal', 'string', 'posterior', {
      group: 'Retroactive pruning',
      choices: ['posterior', 'attention'],
      needs: { use_retroactive_pruning: [] },
    }),
    setting('posterior_threshold', 'number', 0.1, {
      group: 'Retroactive pruning',
      needs: { use_retroactive_pruning: [], pruning_signal: ['posterior'] },
    }),
    setting('decoder', 'string', 'superposed', { group: 'Search', choices: ['superposed', 'tree', 'plain'] }),
    setting('early_exit', 'boolean', false, { group: 'Early exit' }),
    setting('exit_layers', 'integer', null, { many: true, optional: true, minimum: 0 }),
    setting('min_p', 'number', 0.1, { above: 0, below: 1 }),
  ],
}
